"""The expressions of the dashboard and of the alert rules in docker/, and which metrics they name."""

import json
import re

import yaml

from server import repository

DOCKER = repository.PROJECT / "docker"
# Made by Prometheus itself for each target.
OF_PROMETHEUS = {"up"}
_WORDS = {
    "by", "without", "and", "or", "unless", "on", "ignoring", "group_left", "group_right", "bool", "offset",
    "sum", "min", "max", "avg", "count", "topk", "rate", "increase", "changes", "max_over_time", "histogram_quantile", "label_values",
}  # fmt: skip


def expressions() -> dict[str, str]:
    """All of them, by where they are."""
    dashboard = json.loads((DOCKER / "grafana" / "lora.json").read_text())
    found = {f"variable {variable['name']}": variable["query"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    rules = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            found[f"alert {rule['alert']}"] = rule["expr"]
    return found


def metrics_of(expression: str) -> set[str]:
    """The metrics that an expression names: its words but those of the language, of label matchers and of grouping."""
    if expression.startswith("label_values("):
        return {expression.removeprefix("label_values(").split(",")[0].strip()}
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*", bare)) - _WORDS


def labels_of(expression: str) -> set[str]:
    """The labels that an expression matches, groups by, or asks the values of."""
    if expression.startswith("label_values("):
        return {expression.rstrip(")").split(",")[1].strip()}
    matchers = re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression)
    return {*matchers, *(label.strip() for group in grouped for label in group.split(","))}
