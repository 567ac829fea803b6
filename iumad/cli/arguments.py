"""The arguments of every subcommand. Imports nothing heavy."""

import argparse


def make_parser() -> argparse.ArgumentParser:
    """The parser of the ``iumad`` command; ``args.command`` names the module that runs it, or is None."""
    parser = argparse.ArgumentParser(
        prog="iumad", description="Incremental unified anomaly detection in RGB and depth images."
    )
    parser.set_defaults(command=None, json=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = _add(commands, "demo", "render a small data set, learn it step by step, write a report")
    demo.add_argument(
        "--out", metavar="DIR", default="runs/demo", help="run directory (default: %(default)s)"
    )
    demo.add_argument("--protocol", default="4-1", help="as in train (default: %(default)s)")
    _config(demo)
    demo.set_defaults(order=[], seeds=None, bounds=False, data="demo", overwrite=True)

    train = _add(
        commands, "train", "learn the classes of a data set step by step and evaluate after each step"
    )
    train.add_argument(
        "--data", metavar="SPEC", help="folder:PATH, mvtec3d:PATH, eyecandies:PATH, manifest:FILE, demo"
    )
    train.add_argument(
        "--protocol", metavar="X-Y", help="X classes first, then steps of Y; joint; finetune[:X-Y]"
    )
    train.add_argument(
        "--order",
        action="append",
        default=[],
        metavar="ORDER",
        help="class order: a,b,c or random:SEED; several times for several runs",
    )
    train.add_argument(
        "--seeds", metavar="N,N", help="one run for each seed; mean and deviation are reported"
    )
    train.add_argument(
        "--bounds",
        action="store_true",
        help="also run joint (upper bound), finetune (lower) and a memory without training",
    )
    train.add_argument("--out", metavar="DIR", required=True, help="run directory, new or empty")
    train.add_argument("--overwrite", action="store_true", help="delete an earlier run in DIR first")
    _config(train)

    resume = _add(commands, "resume", "go on with a run that was interrupted, to the same result")
    resume.add_argument("run", metavar="DIR")
    _machine(resume)

    evaluate = _add(commands, "eval", "evaluate the checkpoint of a run")
    evaluate.set_defaults(command="evaluate")
    evaluate.add_argument("checkpoint", metavar="RUN", help="run directory or checkpoint file")
    evaluate.add_argument("--data", metavar="SPEC", help="data set (default: that of the run)")
    _machine(evaluate)

    predict = _add(commands, "predict", "score images: one JSON line each, and heat maps")
    predict.add_argument("checkpoint", metavar="RUN", help="run directory or checkpoint file")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="RGB files, or folders of them")
    predict.add_argument(
        "--depth", metavar="PATH", help="depth file, or folder with a file of the same name for every image"
    )
    predict.add_argument(
        "--class", dest="cls", metavar="NAME", help="use this class's threshold, not the predicted one"
    )
    predict.add_argument(
        "--out", metavar="DIR", help="write a heat-map picture for every image to this folder"
    )
    _machine(predict)

    report = _add(commands, "report", "write report.html of a run and print its tables")
    report.add_argument("run", nargs="*", metavar="DIR", help="run directory; any number with --compare")
    report.add_argument("--compare", choices=["paper"], help="print the paper's tables beside the runs")

    data = commands.add_parser("data", help="look at data sets", description="Look at data sets.")
    data_commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = _add(data_commands, "check", "find missing, unreadable or leaking files of a data set")
    check.set_defaults(command="data_check")
    check.add_argument("data", metavar="SPEC", help="as in train; a bare PATH means folder:PATH")

    info = _add(commands, "info", "versions, kernels and devices; or what a checkpoint holds")
    info.add_argument("checkpoint", nargs="?", metavar="RUN", help="run directory or checkpoint file")
    info.add_argument(
        "--cache-benchmark", metavar="SPEC", help="time an epoch with and without the feature cache"
    )
    _config(info)
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=name)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def _config(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--preset", metavar="NAME", help="named configuration (iumad info lists them)")
    source.add_argument("--config", metavar="FILE", help="TOML file with the sections of the configuration")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="change one value"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="same as --set train.seed=N")
    _machine(parser)


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="feature cache (default: $IUMAD_CACHE or ~/.cache/iumad)"
    )
