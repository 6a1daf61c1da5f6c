"""The main job: align a small multilingual model in English only, without and with MLC, and compare.

    python -m mlc_min          # see the README for time, hardware and the figures to expect

Trains four copies of the embedded base model on the same English preference pairs: DPO; DPO + MLC on the prompts'
translations; the control, DPO + MLC with the translations shuffled among the prompts; and DPO + MLC on the states as
they are, without the paper's extractor. Prints one table on test requests none of them was trained on, in any language
or phrasing. On a CPU each copy has one core, so that the figures do not depend on how many there are.
"""

import argparse
import time
from pathlib import Path

from mlc_min.evaluation.pictures import plot_rates, plot_spectra
from mlc_min.evaluation.report import AUC_LEGEND, DIAGNOSTICS_LEGEND, LEGEND, diagnostics_table, text_table
from mlc_min.machinery.errors import Help, run_command
from mlc_min.machinery.files import usable_folder, write_atomically, write_json
from mlc_min.machinery.models import pick_device
from mlc_min.train import TrainConfig


def main() -> None:
    from mlc_min.lab.experiment import MAIN, check_test_rows  # here, so that data that are not there are one line
    from mlc_min.lab.processes import one, side_by_side

    parser = argparse.ArgumentParser(prog="python -m mlc_min", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/demo"), help="folder for the results")
    add("--seed", type=int, default=0, help="of the row order, the extractor and the shuffling")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--steps", type=int, default=TrainConfig.steps, help="of each training")
    add("--split", choices=("test", "validation", "train"), default="test", help="rows to evaluate on")
    add("--test_rows", type=int, help="harmful and harmless prompts per language in place of all, for a quick look")
    arguments = parser.parse_args()
    TrainConfig(seed=arguments.seed, steps=arguments.steps).check()
    check_test_rows(arguments.test_rows)
    output, started = usable_folder(arguments.output, "--output"), time.perf_counter()
    print("expected time on 2 CPU cores: 3 to 5 minutes, in the world of data/large 10 to 15", flush=True)
    names = [*MAIN, "no extractor"]
    if pick_device(arguments.device).type == "cpu":
        # The longest first, so that no core waits for a late one.
        found = side_by_side([*names[2:], *names[:2]], arguments)
    else:
        found = {name: one(name, arguments) for name in names}
    results = {name: found[name] for name in names}
    summaries = {name: result["summary"] for name, result in results.items()}
    diagnostics = {name: result["diagnostics"] for name, result in results.items()}
    parts = text_table(summaries), f"{LEGEND}\n{AUC_LEGEND}", diagnostics_table(diagnostics), DIAGNOSTICS_LEGEND
    text = "\n\n".join(parts)
    plot_rates({name: [summary] for name, summary in summaries.items()}, output / "rates.png")
    plot_spectra(diagnostics, output / "spectra.png")
    write_atomically(output / "table.txt", text + "\n")
    write_json(output / "table.json", results)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{text}\n\n{minutes:.1f} minutes on {results['base']['hardware']}; saved in {output}/")


if __name__ == "__main__":
    run_command(main)
