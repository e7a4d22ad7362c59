"""Tables of what run.sh compiled: python -m experiments.studies.aot.table OUT. Estimates, nothing was run.

Reads OUT.NAME.json of every NAME that is there, keeps them in after.json beside this file, and prints Markdown.
"""

import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
NAMES = {
    "a": "(a) Qwen2.5-0.5B, v5e 2x2",
    "a8": "(a), 8 and narrow given",
    "b": "(b) Qwen2.5-7B, v5e 4x4",
    "b82": "(b), fsdp 8",
    "c": "(c) Qwen2.5-7B, LoRA 32, v6e 2x4",
    "d": "(d) Llama-3-70B, v5p 8x8x4, P 256",
    "a1": "(e) of (a), one H100",
    "a8h": "(e) of (a), 8 H100",
    "b1": "(e) of (b), one H100",
    "b8": "(e) of (b), 8 H100",
    "b42": "(e) of (b), 8 H100",
}
SIZES = "arguments + temporary, GB", "peak, GB", ""
COLUMNS = ("program", "mesh", "microbatches, remat", "estimate", "share", *SIZES, "compiled, s")


def main(out: str) -> None:
    reports = {name: pathlib.Path(f"{out}.{name}.json") for name in NAMES}
    found = {name: json.loads(path.read_text()) for name, path in reports.items() if path.exists() and path.stat().st_size}
    (HERE / "after.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, report in found.items():
        print(*rows_of(NAMES[name], report), sep="\n")
    for name, report in found.items():
        print(f"\n{NAMES[name]}: {dearest_of(report)}")


def rows_of(name: str, report: dict) -> list[str]:
    """Return a row of the update and one of the rollout."""
    update, rollout = report["programs"][:2]
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "1"
    way = f"{report['num_microbatches']}, {report['remat']}"
    secs, token_secs = report["update_secs"], report["token_secs"]
    estimates = [f"{secs:.2f} s" if secs else "-", f"{1e3 * token_secs:.2f} ms a token" if token_secs else "-"]
    shares = [f"{share:.1%}" if share else "-" for share in (report["update_peak_share"], report["token_memory_share"])]
    capacity = report["free_bytes"] + max(each["held_bytes"] for each in (update, rollout))
    rows = []
    for program, given, estimate, share in zip((update, rollout), (way, ""), estimates, shares, strict=True):
        held = f"{program['argument_bytes'] / 1e9:.2f} + {program['temporary_bytes'] / 1e9:.2f}"
        left = capacity - program["held_bytes"]
        fits = program["error"][:60] or (f"{left / capacity:.0%} free" if left > 0 else f"no: {-left / 1e9:.0f} GB over")
        cells = f"{name}: {program['name']}", mesh, given, estimate, share, held, f"{program['held_bytes'] / 1e9:.2f}", fits
        rows.append(f"| {' | '.join((*cells, format(program['compile_secs'], '.0f')))} |")
    return rows


def dearest_of(report: dict) -> str:
    """Return the dearest source lines of update and rollout, and the kernels."""
    texts = []
    for program in report["programs"][:2]:
        dearest = program["dearest"][:4] if program["secs"] else []
        lines = [f"{line['source']} {line['kernel']}".strip() + f" {line['share']:.0%}" for line in dearest]
        kernels = sorted({each["name"] for each in program["kernels"]})
        texts.append(f"{program['name']}: {', '.join(lines) or 'no cycles'}; kernels: {', '.join(kernels) or 'none'}")
    return ". ".join(texts) + "."


if __name__ == "__main__":
    main(sys.argv[1])
