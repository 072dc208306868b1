"""The table of settings: what the README says of it, and the way there and back."""

from jaxlora.settings import Settings, markdown_table
from server.repository import PROJECT


def test_the_readme_has_the_table_as_it_is() -> None:
    assert f"\n{markdown_table()}\n" in (PROJECT / "README.md").read_text()


def test_an_environment_gives_the_settings_that_it_was_made_from() -> None:
    settings = Settings(quantization="int8", lora_quantization="int8", max_slots=3, queue_timeout_s=1.5)
    assert Settings.read(settings.environment()) == settings
