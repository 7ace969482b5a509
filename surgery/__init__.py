"""Structured surgery: find the channels that live or die together, cut them out, prove that nothing else changed."""

from surgery.capture import ExampleInputs, as_call, evaluating
from surgery.check import check_equal
from surgery.cut import Receipt, cut, mask
from surgery.errors import BadFile, BadKeep, CaptureFailed, FinderFailed, NotCopied, NotEqual, NotFollowed, SurgeryError
from surgery.finder import trace
from surgery.graph import ChannelGraph, ChannelGroup, Keep, Layer, Pinned, Slot
from surgery.size import Size, SizeModel
from surgery.store import load, save

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
    "check_equal",
    "cut",
    "evaluating",
    "load",
    "mask",
    "save",
    "trace",
]
