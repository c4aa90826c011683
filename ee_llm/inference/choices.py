"""The values that options of inference accept; this module imports no torch."""

from typing import Literal

Attention = Literal["auto", "gather", "plain", "varlen", "flash"]
Bos = Literal["auto", "on", "off"]
DeferralMode = Literal["auto", "off"]
DtypeName = Literal["auto", "float32", "bfloat16", "float64"]
Measure = Literal["max_probability", "entropy", "margin"]
Quantize = Literal["none", "int8"]
