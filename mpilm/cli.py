"""The command `mpilm`: a table of subcommands, each a function with typed arguments.

`mpilm --help` imports neither torch nor MPI; a subcommand loads its module only when it
is called. tyro turns the function's signature into its options.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from mpilm import __version__
from mpilm.errors import (
    BAD_INPUT,
    MpilmError,
    TerminatedError,
    interruption,
    say,
    signal_behind,
)
from mpilm.launch import launched_rank, terminal_width

SPEAK_S = 2.0  # mpirun ends rank 0 when another rank leaves before it has spoken
# commands whose ranks share the work; others run once, on rank 0
PARALLEL = {
    ("train",),
    ("resume",),
    ("pretrain",),
    ("eval",),
    ("doctor",),
    ("probe",),
    ("align",),
    ("decode",),
}

# words of the command -> "module:function", one line of help
COMMANDS: dict[tuple[str, ...], tuple[str, str]] = {
    ("prepare", "text"): (
        "mpilm.commands.prepare:text",
        "corpus from text files (WikiText, PTB and the like)",
    ),
    ("prepare", "docs"): (
        "mpilm.commands.prepare:docs",
        "corpus from Python's own documentation; no download",
    ),
    ("prepare", "synthetic"): (
        "mpilm.commands.prepare:synthetic",
        "corpus of a random language with a known perplexity floor",
    ),
    ("prepare", "wav"): (
        "mpilm.commands.speech:wav",
        "corpus of recordings: features and alignment with word HMMs",
    ),
    ("prepare", "kaldi"): (
        "mpilm.commands.kaldi:kaldi",
        "corpus of features and alignments that Kaldi made",
    ),
    ("train",): ("mpilm.commands.train:train", "train a model (under mpirun or alone)"),
    ("resume",): ("mpilm.commands.train:resume", "go on with a run that was stopped"),
    ("join",): ("mpilm.commands.join:ask", "let a run that trains have more ranks"),
    ("pretrain",): (
        "mpilm.commands.pretrain:pretrain",
        "first weights of a DNN by restricted Boltzmann machines",
    ),
    ("eval",): ("mpilm.commands.evaluate:eval_", "perplexity of a trained model"),
    ("align",): ("mpilm.commands.speech:align", "new labels by a trained model"),
    ("decode",): ("mpilm.commands.speech:decode", "words and their error rate"),
    ("export",): (
        "mpilm.commands.export:export",
        "a model as safetensors, or its scores for Kaldi's decoders",
    ),
    ("generate",): ("mpilm.commands.evaluate:generate", "text from a trained model"),
    ("report",): ("mpilm.commands.report:report", "draw runs on one HTML page"),
    ("doctor",): (
        "mpilm.commands.doctor:doctor",
        "check this machine: MPI, cores, GPUs, network, folders",
    ),
    ("submit",): (
        "mpilm.commands.submit:submit",
        "submit training jobs to SLURM or PBS; scaling sweeps",
    ),
    ("probe",): (
        "mpilm.commands.probe:probe",
        "measure this machine under mpirun, for simulate",
    ),
    ("simulate",): (
        "mpilm.commands.simulate:simulate",
        "predict scaling and loss on another machine, in virtual time",
    ),
    ("plan",): (
        "mpilm.commands.plan:plan",
        "choose strategy, period and batch for a cluster",
    ),
    ("sweep",): (
        "mpilm.commands.sweep:sweep",
        "run many combinations from one file: simulated, here, or submitted",
    ),
    ("status",): (
        "mpilm.commands.sweep:status",
        "how a sweep's points, or a run's ranks, stand",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    print_anything()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["--version"], ["-V"]):
        print(f"mpilm {__version__}")
        return 0
    command = find_command(words)
    if command not in PARALLEL and launched_rank() > 0:
        return 0
    warnings.showwarning = show_warning  # type: ignore[assignment]
    try:
        catch_terminate()
        if command is None:
            return show_commands(words)
        return run_command(command, words[len(command) :])
    except MpilmError as error:
        if (behind := signal_behind(error)) is not None:
            return say_interrupted(behind)
        if launched_rank() == 0 or not error.everywhere:
            say(str(error))
        return BAD_INPUT
    except KeyboardInterrupt as signalled:
        return say_interrupted(signalled)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except SystemError as error:
        if (behind := signal_behind(error)) is not None:
            return say_interrupted(behind)
        raise


def say_interrupted(signalled: KeyboardInterrupt) -> int:
    """Say that a signal has ended the command; return the exit code."""
    code, text = interruption(signalled)
    say(text)
    return code


def catch_terminate() -> None:
    """Let SIGTERM and SIGHUP end a command in order: no file is left half-written.

    `train` has handlers of its own while it trains; who ignores a signal (nohup), or
    has a handler already, keeps that.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _terminate)


def _terminate(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough: we are tidying up
    raise TerminatedError


def show_commands(words: Sequence[str]) -> int:
    """Print what there is, to who asked or named no command; return the exit code."""
    asked = not words or words[-1] in ("-h", "--help", "help")
    print(overview(), file=sys.stdout if asked else sys.stderr)
    if not asked:
        say(f"no command {words[0]!r}")
    return 0 if asked else BAD_INPUT


def print_anything() -> None:
    """Let print escape what the terminal's encoding lacks, as it does on stderr.

    That may be a word of a corpus, or a byte in a path that is no UTF-8.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning as one line; all ranks get the same ones, so rank 0 speaks."""
    if launched_rank() == 0:
        say(" ".join(["warning:", *str(message).split()]))


def find_command(words: Sequence[str]) -> tuple[str, ...] | None:
    """Return the command that `words` begin with."""
    for length in (2, 1):
        if tuple(words[:length]) in COMMANDS:
            return tuple(words[:length])
    return None


def run_command(command: tuple[str, ...], arguments: Sequence[str]) -> int:
    """Call the function of `command` with arguments parsed by its signature."""
    import tyro

    target, _ = COMMANDS[command]
    module_name, function_name = target.split(":")
    module = import_module(module_name)
    function = getattr(module, function_name)
    prog = " ".join(("mpilm", *command))
    if "OMPI_COMM_WORLD_RANK" in os.environ and terminal_width() is None:
        os.environ["TERM"] = "dumb"  # a rank has a terminal, but nobody sees it
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_whole_numbers)
    try:
        with registry:
            code = tyro.cli(
                function,
                prog=prog,
                args=list(arguments),
                console_outputs=launched_rank() == 0,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        helped = stop.code == 0 and launched_rank() == 0
        if helped and hasattr(module, "more_help"):
            print(module.more_help())
        if stop.code and launched_rank() > 0:
            time.sleep(SPEAK_S)
        raise
    return int(code or 0)


def _whole_numbers(kind: Any) -> Any:
    """Return tyro's rule for integers: 1e6 is one, as in a configuration."""
    from tyro.constructors import PrimitiveConstructorSpec

    from mpilm.convert import whole_number

    if kind.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def overview() -> str:
    """Return the text of `mpilm --help`."""
    width = max(len(" ".join(words)) for words in COMMANDS)
    rows = [
        f"  {' '.join(words):<{width}}  {text}" for words, (_, text) in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: mpilm COMMAND ...    (mpilm COMMAND --help: its options)",
            "",
            "MPI-based training of LSTM language models and acoustic models.",
            "",
            *rows,
            "",
            f"mpilm {__version__}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
