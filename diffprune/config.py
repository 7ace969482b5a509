"""The settings of one compress run, and their TOML file."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from diffprune.errors import BadConfig

BUDGETS = ("macs", "params", "speedup")
_ONE_BUDGET = "exactly one of macs, params, speedup"


def _digits_to_int(value: object) -> object:
    """A command line hands over "8" for 8."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


class Config(BaseModel):
    """Settings of one run; a field's description says which values it takes.

    Paths stay as they were written: a relative one means what it says in the current folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str = Field(min_length=1, description="torchvision:NAME, digits:resnet18 or package.module:factory")
    weights: str | None = Field(
        default=None, min_length=1, description="DEFAULT or another torchvision name, a .safetensors, .pt or .pth file"
    )
    data: str = Field(
        min_length=1,
        description="digits, cifar10:PATH, mnist:PATH, imagefolder:PATH, npz:PATH or package.module:function",
    )
    macs: float | None = Field(default=None, gt=0, le=1, description="a MACs share, above 0 and at most 1")
    params: float | None = Field(default=None, gt=0, le=1, description="a parameter share, above 0 and at most 1")
    speedup: float | None = Field(default=None, gt=1, description="dense latency / pruned latency, above 1")
    epochs: float = Field(default=5.0, ge=0, description="epochs of search and recovery, 0 or more; 0 only calibrates")
    parent_epochs: int = Field(default=0, ge=0, description="epochs that train the dense parent first, 0 or more")
    parent_lr: float = Field(default=0.05, gt=0, description="the learning rate of the dense parent, above 0")
    batch: int | None = Field(default=None, ge=1, description="images in a batch, 1 or more")
    image_size: int | None = Field(default=None, ge=1, description="pixels, 1 or more")
    lr: float = Field(default=0.01, gt=0, description="a learning rate above 0")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="float32 or bfloat16")
    gate: Literal["diffprune", "diffprune-deterministic", "hard-concrete"] = Field(
        default="diffprune", description="diffprune, diffprune-deterministic or hard-concrete"
    )
    round_to: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_digits_to_int)] = Field(
        default="auto", description="channels that widths are rounded up to, 1 or more, or auto"
    )
    threads: int = Field(default=1, ge=1, description="CPU threads that latency is measured with, 1 or more")
    latency_batch: int = Field(default=1, ge=1, description="images at once in latency measurements, 1 or more")
    latency_device: Literal["cpu", "cuda"] = Field(default="cpu", description="cpu or cuda")
    latency_precision: Literal["fp32", "tf32", "fp16"] = Field(default="fp32", description="fp32, tf32 or fp16")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="cpu or cuda")
    seed: int = Field(default=0, ge=0, lt=2**32, description="0 to 4294967295")
    license: str = Field(default="unknown", min_length=1, description="the licence of the weights, such as mit")
    static_twin: bool = Field(default=False, description="true or false: pruned ONNX files with a fixed batch of 1 too")
    preprocessing: bool = Field(default=False, description="true or false: an ONNX file that takes uint8 pixels too")
    output: str = Field(min_length=1, description="the folder of the run")

    @model_validator(mode="after")
    def _one_budget(self) -> "Config":
        if sum(getattr(self, kind) is not None for kind in BUDGETS) != 1:
            raise ValueError(_ONE_BUDGET)
        return self


def config_from(values: Mapping[str, Any], *, source: str = "the settings given") -> Config:
    """The checked settings. `source` says in an error where the values came from.

    Raises:
        BadConfig: lists every setting that is wrong, its value and what is allowed.
    """
    try:
        return Config(**values)
    except ValidationError as error:
        # A union reports one error for each of its members, hence the dict.
        wrong = {str(entry["loc"][0]): _wrong(str(entry["loc"][0]), values) for entry in error.errors() if entry["loc"]}
        given = [f"{kind} = {values[kind]!r}" for kind in BUDGETS if values.get(kind) is not None]
        facts = list(wrong.values())
        if len(given) != 1:
            facts.append(f"budget: {' and '.join(given) or 'none given'}; allowed: {_ONE_BUDGET}")
        count = "1 setting is" if len(facts) == 1 else f"{len(facts)} settings are"
        raise BadConfig(
            f"{count} wrong:" + "".join(f"\n    {fact}" for fact in facts),
            at=source,
            effect="nothing was started and nothing was written",
            fix="change what is listed to an allowed value",
        ) from error


def _wrong(key: str, values: Mapping[str, Any]) -> str:
    if key not in Config.model_fields:
        nearest = difflib.get_close_matches(key, Config.model_fields, n=1)
        known = f"the nearest known one is {nearest[0]}" if nearest else f"known: {', '.join(Config.model_fields)}"
        return f"{key}: unknown setting; {known}"
    given = f"{key} = {values[key]!r}" if key in values else f"{key}: missing"
    return f"{given}; allowed: {Config.model_fields[key].description}"


def load_config(path: str | Path) -> Config:
    """The settings in a TOML file.

    Raises:
        BadConfig: the file is missing, is not TOML (with the line), or holds settings that are unknown or wrong.
    """
    return config_from(load_values(path), source=str(path))


def load_values(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds, unchecked. Raises BadConfig if it is missing or not TOML (with the line)."""
    effect = "nothing was started and nothing was written"
    try:
        return tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise BadConfig(
            f"the settings cannot be read: {error.strerror}", at=str(path), effect=effect, fix="give a TOML file"
        ) from error
    except ValueError as error:  # TOMLDecodeError, which says the line, and UnicodeDecodeError
        raise BadConfig(
            f"the settings are not valid TOML: {error}", at=str(path), effect=effect, fix="mend the file there"
        ) from error


def portable(config: Config) -> Config:
    """The settings as others may read them: of an absolute path only the last name is left, a relative one stays.

    Run in the folders that hold these names, or with the paths given again, they mean the same.
    """
    source, colon, path = config.data.partition(":")
    short = {"data": source + colon + last_of(path), "output": last_of(config.output)}
    return config.model_copy(update=short | ({"weights": last_of(config.weights)} if config.weights else {}))


def last_of(path: str) -> str:
    """The last name of an absolute path, a relative one as it is."""
    return Path(path).name or "." if Path(path).is_absolute() else path


def to_toml(config: Config) -> str:
    """The settings as TOML, one line each in the order of the fields, without None; `load_config` gives them back."""
    lines = (f"{key} = {_toml(value)}\n" for key, value in config if value is not None)
    return "".join(lines)


def _toml(value: object) -> str:
    # JSON's strings are TOML's, but for DEL, which TOML wants escaped; its booleans are, too, but not its numbers.
    text = isinstance(value, str | bool)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if text else repr(value)
