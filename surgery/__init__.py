"""Structured surgery: find the channels that live or die together, cut them out, prove that nothing else changed."""

from surgery.capture import ExampleInputs, as_call, evaluating
from surgery.check import check_equal
from surgery.cut import Receipt, cut, mask
from surgery.errors import (
    BadFile,
    BadKeep,
    CaptureFailed,
    FinderFailed,
    NotCarried,
    NotCopied,
    NotEqual,
    NotFollowed,
    SurgeryError,
)
from surgery.finder import trace
from surgery.graph import ChannelGraph, ChannelGroup, Keep, Layer, Pinned, Slot
from surgery.norms import gate_norm_, norm_units, ungate_
from surgery.optimizer import carry_optimizer_
from surgery.size import Size, SizeModel
from surgery.store import load, save
from surgery.unread import unread

__all__ = [
    "BadFile",
    "BadKeep",
    "CaptureFailed",
    "ChannelGraph",
    "ChannelGroup",
    "ExampleInputs",
    "FinderFailed",
    "Keep",
    "Layer",
    "NotCarried",
    "NotCopied",
    "NotEqual",
    "NotFollowed",
    "Pinned",
    "Receipt",
    "Size",
    "SizeModel",
    "Slot",
    "SurgeryError",
    "as_call",
    "carry_optimizer_",
    "check_equal",
    "cut",
    "evaluating",
    "gate_norm_",
    "load",
    "mask",
    "norm_units",
    "save",
    "trace",
    "ungate_",
    "unread",
]
