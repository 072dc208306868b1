"""Tokens that are guessed from the text so far: one stream with and without, on answers that quote their prompt and answers that don't."""

import statistics
from collections.abc import Iterator
from typing import Any

from bench import adapters, measure as arithmetic
from bench.scenarios.context import Context, Skipped
from bench.worker import Request
from jaxlora.text import Tokenizer
from server.repository import PROJECT

ANSWER, PARAGRAPHS = 96, 4
TEXT = "bench/README.md"
TASKS = {
    "quotes its prompt": "Repeat the following text word for word.\n\n{text}",
    "answers freely": "Write a short story about a lighthouse keeper who finds a letter, in the manner of chapter {number}.",
}


def measure(context: Context) -> dict[str, Any]:
    most = context.settings.prompt_lookup_tokens
    tokenizer = Tokenizer.from_folder(context.model)
    if not most or not tokenizer.has_chat_template:
        raise Skipped("PROMPT_LOOKUP_TOKENS is 0, or the model has no chat template")
    prepared = adapters.prepare(context.cache, context.config, context.settings_of(), adapters.sixteen())
    settings = {"without": context.settings_of(prompt_lookup_tokens=0), "with": context.settings_of()}
    with context.systems(["engine"], prepared, settings["without"]) as plain, context.systems(["engine"], prepared, settings["with"]) as guessing:
        sessions = {"without": plain, "with": guessing}
        rows, found = [], {}
        for task in TASKS:
            speeds: dict[str, list[float]] = {name: [] for name in sessions}
            answers: dict[str, list[list[int]]] = {name: [] for name in sessions}
            for request in _requests(tokenizer, task, context.options.repeat):
                for name, session in sessions.items():
                    told, _ = session.turn("engine", [request], 1)
                    speeds[name].append(arithmetic.run_of(told, len(request.prompt)).decode)
                    answers[name].append(told[0].ids)
            if answers["with"] != answers["without"]:
                raise AssertionError("answers differ with guesses")
            ratio = statistics.median(fast / slow for fast, slow in zip(speeds["with"], speeds["without"]))
            slow, fast = (arithmetic.Spread.of(speeds[name]) for name in ("without", "with"))
            rows.append([task, f"{slow.median:.0f}", f"{fast:.0f}", f"{ratio:.2f}"])
            found[task] = speeds
    return {
        "title": f"Guessed tokens: one stream, base model, engine alone, {context.dtype}",
        "columns": ["the answer", "without, tokens/s", f"up to {most} guessed, tokens/s", "ratio"],
        "rows": rows,
        "note": f"Answers of {ANSWER} tokens, the same with and without. Quoted are paragraphs of {TEXT}.",
        "speeds": found,
    }


def _requests(tokenizer: Tokenizer, task: str, repeat: int) -> Iterator[Request]:
    paragraphs = sorted((PROJECT / TEXT).read_text().split("\n\n"), key=len)[-PARAGRAPHS:]
    for repetition in range(repeat):
        for index, paragraph in enumerate(paragraphs):
            # Every repetition asks something else, which no cache has seen.
            text, number = " ".join(paragraph.split()[repetition:][:90]), repetition * PARAGRAPHS + index + 1
            messages = [{"role": "user", "content": TASKS[task].format(text=text, number=number)}]
            yield Request(tokenizer.apply_chat_template(messages), tokenizer.render_chat(messages), ANSWER)
