"""Every error Powertrain raises, each with a stable code and a way out.

::

    PowertrainError                 PT000
    ├── ConfigError                 PT100  every problem of a configuration at once
    ├── PluginError                 PT200
    │   ├── PluginMissing           PT201  named, but not installed
    │   ├── PluginBroken            PT202  installed, but does not import or construct
    │   ├── PluginConflict          PT203  two claim one name or answer one hook
    │   ├── PluginIncompatible      PT204  written for another plugin API
    │   └── HookInvalid             PT205  a hook that does not match its specification
    ├── AcceleratorError            PT300  none usable, or the chosen one is not there
    ├── LaunchError                 PT310  the launcher's variables contradict one another
    ├── BatchError                  PT400  a batch that cannot be split as configured
    ├── DataError                   PT410  a dataset that cannot be sampled as configured
    ├── EngineError                 PT420  the engine was called in an order it cannot serve
    │   └── ParameterFreed          PT421  a sharded parameter was touched where it is not gathered
    ├── OptimizerError              PT430  an unknown optimizer or option
    ├── SchedulerError              PT440  an unknown schedule or option
    ├── PrecisionError              PT450  numbers the device or the recipe cannot carry
    ├── ShardingError               PT460  a model or a world that cannot be cut as configured
    ├── BirthError                  PT470  a parameter or buffer that cannot get its first value
    ├── CommunicationError          PT500
    │   ├── CommunicatorMissing     PT501  several ranks, and nothing to connect them
    │   ├── CollectiveStalled       PT502  a collective did not finish in time
    │   ├── CollectiveDiverged      PT503  ranks issued different collectives
    │   └── PeerFailed              PT504  another rank raised or died
    ├── CheckpointError             PT600
    │   ├── CheckpointMissing       PT601  no such directory or tag
    │   ├── ManifestMissing         PT602  the save never finished, or it is no checkpoint
    │   ├── ShardMissing            PT603  a file the manifest lists is not there
    │   ├── ShardTruncated          PT604  a file is shorter than the manifest says
    │   ├── ShardCorrupt            PT605  a file's bytes do not match their checksum
    │   ├── CheckpointMismatch      PT606  made from another model
    │   └── CheckpointWriteFailed   PT607  a save did not reach the disk
    ├── NativeError                 PT700
    │   ├── CompilerMissing         PT701  nothing can build C++ here
    │   └── BuildFailed             PT702  C++ that did not compile, load, or come in time
    └── StorageError                PT800
        ├── StorageUnwritable       PT801  a path that state cannot rest at
        ├── StorageUnfit            PT802  a file system that is the wrong kind of place for it
        ├── StorageFull             PT803  less free space than the state needs
        ├── EngineUnavailable       PT804  the I/O engine that is asked for does not work here
        ├── HostMemoryShort         PT805  less host memory than the state needs
        └── TransferFailed          PT806  a read or write that failed, or came out short, during the run

A user's mistake exits a command with 2, a failure of the run with 1.
"""

from __future__ import annotations

from typing import ClassVar


class PowertrainError(Exception):
    """The root of every error that Powertrain raises on purpose.

    Args:
        message: what is wrong, in one sentence, with the offending value.
        where: the place: ``file:line:column``, a rank, a parameter's name.
        expected: what would have been right.
        found: what was there instead.
        remedy: what to do next; the class's own advice when omitted.
    """

    code: ClassVar[str] = "PT000"
    exit_code: ClassVar[int] = 1
    advice: ClassVar[str] = "run `powertrain doctor` and include its output in a report"

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy or self.advice

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.message}"]
        for label, value in (
            ("at", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("to fix", self.remedy),
        ):
            if value:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from positional arguments; ours carry keywords.
        return (_rebuild, (type(self), self.__dict__.copy(), self.args))


def _rebuild(kind: type[PowertrainError], state: dict[str, object], args: tuple[object, ...]) -> PowertrainError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(PowertrainError):
    """A configuration with problems; ``problems`` lists every one of them."""

    code = "PT100"
    exit_code = 2
    advice = "mend the listed keys; `powertrain config schema` lists every legal key"

    def __init__(self, message: str, *, problems: tuple[object, ...] = (), remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.problems = problems

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.message}"]
        lines += [f"  {problem}" for problem in self.problems]
        lines.append(f"  to fix: {self.remedy}")
        return "\n".join(lines)


class PluginError(PowertrainError):
    """Something is wrong with a plugin, before any training starts."""

    code = "PT200"
    exit_code = 2
    advice = "`powertrain plugins` shows what is installed and in which state"


class PluginMissing(PluginError):
    """The configuration names a plugin that is not installed."""

    code = "PT201"
    advice = "install the package that provides it; `powertrain plugins` lists what is here"


class PluginBroken(PluginError):
    """A plugin that the run needs cannot be imported or constructed."""

    code = "PT202"
    advice = "mend or reinstall its distribution, or leave it out of the configuration"


class PluginConflict(PluginError):
    """Two plugins claim one name, or answer one hook that takes one answer."""

    code = "PT203"
    advice = "choose one with `[plugins] pin`, or uninstall the other"


class PluginIncompatible(PluginError):
    """A plugin written for a plugin API that this core does not serve."""

    code = "PT204"
    advice = "install matching versions of powertrain-core and the plugin"


class HookInvalid(PluginError):
    """A hook implementation that does not match any specification."""

    code = "PT205"
    advice = "compare it with the specifications in `powertrain.hookspecs`"


class AcceleratorError(PowertrainError):
    """No accelerator can be used, or the chosen one is not available."""

    code = "PT300"
    exit_code = 2
    advice = "install an accelerator plugin, for example `pip install powertrain-cpu`"


class LaunchError(PowertrainError):
    """The launcher's variables are missing, malformed or contradict one another."""

    code = "PT310"
    exit_code = 2
    advice = "start with `powertrain launch --nproc N script.py`, or set RANK, WORLD_SIZE and LOCAL_RANK together"


class BatchError(PowertrainError):
    """A batch that cannot be split the way the configuration says."""

    code = "PT400"
    exit_code = 2
    advice = "make the batch's first dimension micro x accumulation samples"


class DataError(PowertrainError):
    """A dataset that cannot be read or sampled the way the configuration says."""

    code = "PT410"
    exit_code = 2
    advice = "check the dataset's length and files against the configuration"


class EngineError(PowertrainError):
    """The engine was called in an order that it cannot serve."""

    code = "PT420"
    advice = "see `powertrain.Engine` for the order of calls"


class ParameterFreed(EngineError):
    """A sharded parameter was touched while this rank holds only its slice of it."""

    code = "PT421"
    advice = "wrap the access in `with powertrain.full(module):`"

    def __init__(self, message: str, **parts: str | None) -> None:
        super().__init__(message, **parts)
        # ``load_state_dict`` catches it, once for each parameter, and shows nothing but this, in one line.
        self.args = (" ".join(str(self).split()),)


class OptimizerError(PowertrainError):
    """An optimizer that is unknown, or an option that it does not take."""

    code = "PT430"
    exit_code = 2
    advice = "see `powertrain config schema optimizer`"


class SchedulerError(PowertrainError):
    """A learning-rate schedule that is unknown, or an option that it does not take."""

    code = "PT440"
    exit_code = 2
    advice = "see `powertrain config schema scheduler`"


class PrecisionError(PowertrainError):
    """A number format that the device lacks, or a loss that left its range for good."""

    code = "PT450"
    advice = "choose another `[precision] compute`, or lower the learning rate"


class ShardingError(PowertrainError):
    """A model or a world that cannot be cut the way the configuration says."""

    code = "PT460"
    exit_code = 2
    advice = "see the section that the message names in docs/configuration.md"


class BirthError(PowertrainError):
    """A parameter or buffer that cannot be given its first value."""

    code = "PT470"
    exit_code = 2
    advice = "build the model inside `with powertrain.deferred():`, or give `weights=` to powertrain.initialize"


class CommunicationError(PowertrainError):
    """Ranks could not talk to one another."""

    code = "PT500"
    advice = "`powertrain doctor` tests the collectives"


class CommunicatorMissing(CommunicationError):
    """Several ranks were started, but no plugin connects them."""

    code = "PT501"
    exit_code = 2
    advice = "pip install powertrain-comm"


class CollectiveStalled(CommunicationError):
    """A collective did not finish within `[communicator] timeout`."""

    code = "PT502"
    advice = (
        "look at the rank that the table shows behind the others; raise `[communicator] timeout` if it was only slow"
    )


class CollectiveDiverged(CommunicationError):
    """Ranks issued different collectives at the same point of their sequence."""

    code = "PT503"
    advice = "make every rank take the same branch, or give each the same batches"


class PeerFailed(CommunicationError):
    """Another rank raised an exception or died; its report is the one to read."""

    code = "PT504"
    advice = "read above what the first rank that failed says; one that was killed (out of memory?) says nothing"


class CheckpointError(PowertrainError):
    """A checkpoint could not be written or read."""

    code = "PT600"
    advice = "`powertrain export --list DIRECTORY` shows which checkpoints are complete"


class CheckpointMissing(CheckpointError):
    """There is no checkpoint at this place."""

    code = "PT601"
    advice = "check the directory and the tag"


class ManifestMissing(CheckpointError):
    """The directory has no manifest: the save never finished, or it is something else."""

    code = "PT602"
    advice = "load an older tag, or leave the tag out to load the newest complete one"


class ShardMissing(CheckpointError):
    """A file that the manifest lists is not there."""

    code = "PT603"
    advice = "copy the whole directory again, or load another tag"


class ShardTruncated(CheckpointError):
    """A file is shorter or longer than the manifest says."""

    code = "PT604"
    advice = "copy the file again, or load another tag"


class ShardCorrupt(CheckpointError):
    """A file's bytes do not match the checksum in the manifest."""

    code = "PT605"
    advice = "copy the file again, or load another tag; check the disk"


class CheckpointMismatch(CheckpointError):
    """The checkpoint was made from a model with other names or shapes."""

    code = "PT606"
    exit_code = 2
    advice = "build the model that was saved"


class CheckpointWriteFailed(CheckpointError):
    """A save did not reach the disk; the checkpoints before it are untouched."""

    code = "PT607"
    advice = "free space or choose another directory; the last complete checkpoint still loads"


class NativeError(PowertrainError):
    """C++ that this machine should run could not be had."""

    code = "PT700"
    advice = "`powertrain kernels list` shows what is built"


class CompilerMissing(NativeError):
    """Nothing can build C++ here."""

    code = "PT701"
    advice = "install a C++ compiler (Debian and Ubuntu: g++; Fedora: gcc-c++), or set CXX"


class BuildFailed(NativeError):
    """C++ did not compile, did not load, or was not built in time."""

    code = "PT702"
    advice = (
        "try another compiler (CXX=…), or go on without, by POWERTRAIN_NATIVE=0: the PyTorch reference gives the same "
        "answers, more slowly"
    )


class StorageError(PowertrainError):
    """State that rests outside the device could not be kept there."""

    code = "PT800"
    advice = "see the storage and what it says; the last checkpoint still loads"


class StorageUnwritable(StorageError):
    """State cannot rest at this path: it is not there, no directory, or not writable."""

    code = "PT801"
    exit_code = 2
    advice = "name a directory on a local disk that this user may write to"


class StorageUnfit(StorageError):
    """The file system at this path is the wrong kind of place: memory, or a network."""

    code = "PT802"
    exit_code = 2
    advice = "name a directory on a local disk"


class StorageFull(StorageError):
    """There is less free space than the state needs."""

    code = "PT803"
    exit_code = 2
    advice = "free space, or name a larger disk"


class EngineUnavailable(StorageError):
    """The I/O engine that is asked for does not work here."""

    code = "PT804"
    exit_code = 2
    advice = "leave the key out, for the fastest engine that works here"


class HostMemoryShort(StorageError):
    """There is less host memory than the state needs."""

    code = "PT805"
    exit_code = 2
    advice = "let it rest on a disk, or use more hosts"


class TransferFailed(StorageError):
    """A read or write failed during the run, or moved fewer bytes than it had to."""

    code = "PT806"
    advice = "see to the disk, then resume from the last checkpoint, which is untouched"
