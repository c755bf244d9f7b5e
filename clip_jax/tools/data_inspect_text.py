"""The figures of `clip_jax.data.inspect` as text."""

from typing import Any

_BAR = 40


def survey_text(facts: dict[str, Any]) -> str:
    """What the command prints."""
    lines = _head(facts)
    if facts["pictures"]:
        lines += _captions(facts) + _pictures(facts)
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"{name:<11} {text}"


def _bar(share: float) -> str:
    return "#" * round(share * _BAR)


def _head(facts: dict[str, Any]) -> list[str]:
    looked, bad = facts["looked_at"], sum(facts["bad"].values())
    causes = ", ".join(f"{n:,} {cause}" for cause, n in facts["bad"].items())
    lines = [
        _row("source", " and ".join(facts["source"])),
        _row("shards", f"{facts['shards']:,}"),
        *(_row("", f"left out: {s['name']}: {s['cause']}") for s in facts["bad_shards"]),
        _row("samples", f"{facts['samples']:,}, of which {looked:,} were looked at")
        + ("" if facts["complete"] else " before the interruption"),
        _row("bad", f"{bad:,} ({bad / max(1, looked):.2%})" + (f": {causes}" if causes else "")),
    ]
    repeated, names = facts["repeated_keys"], ", ".join(facts["first_repeated_keys"])
    text = f"{repeated:,} samples have the key of an earlier one" if repeated else "all different"
    return [
        *lines,
        _row("keys", text + (f": {names}" + (", ..." if repeated > 5 else "")) * bool(names)),
    ]


def _captions(facts: dict[str, Any]) -> list[str]:
    count, tokens, longest = facts["captions"], facts["tokens"], facts["context_length"]
    if not count:
        return [_row("captions", "none; class numbers alone")]
    lines = [
        _row(
            "captions",
            f"{facts['captions_per_picture']:.2f} a picture; {tokens['low']} to {tokens['high']}"
            f" tokens, median {tokens['median']}, mean {tokens['mean']:.1f};"
            f" {facts['cut_captions'] / count:.2%} longer than {longest}, which are cut",
        ),
        _row("", f"tokens up to   captions   batches of {facts['batch_size']}"),
    ]
    for bucket in facts["buckets"]:
        share = bucket["captions"] / count
        lines.append(
            _row(
                "",
                f"{bucket['tokens']:12}   {share:8.2%}   {bucket['batches']:8.2%}  {_bar(share)}",
            )
        )
    return lines


def _pictures(facts: dict[str, Any]) -> list[str]:
    count, side = facts["pictures"], facts["short_side"]
    kinds = ", ".join(f"{kind} {n / count:.1%}" for kind, n in facts["kinds"].items())
    sizes = ", ".join(f"{w} x {h} ({n / count:.1%})" for w, h, n in facts["sizes"])
    lines = [
        _row("pictures", f"{kinds}; {facts['bytes_per_picture'] / 1024:,.1f} KiB each"),
        _row("", f"most frequent sizes: {sizes}"),
        _row("", f"short side {side['low']} to {side['high']} pixels, median {side['median']}"),
    ]
    for bound, n in facts["short_sides"].items():
        if n:
            name = f"up to {bound:>4}" if bound != "more" else "more"
            lines.append(_row("", f"{name:>12}   {n / count:8.2%}  {_bar(n / count)}"))
    if facts["labelled"]:
        lines.append(
            _row("classes", f"{facts['classes']:,} numbers on {facts['labelled'] / count:.1%}")
        )
    for i, (name, about) in enumerate(facts["fields"].items()):
        bounds = f", {about['low']:g} to {about['high']:g}" if "low" in about else ""
        text = f"{name} in {about['samples'] / count:.1%}{bounds}"
        lines.append(_row("" if i else "fields", text))
    return lines
