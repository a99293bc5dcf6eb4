"""Where rows live, one file a format."""

from ddp_stream.sources.arrow import Arrow, HFDataset
from ddp_stream.sources.base import DataError, Source
from ddp_stream.sources.compressed import CompressedText
from ddp_stream.sources.csv import Csv
from ddp_stream.sources.forward import ForwardOnly
from ddp_stream.sources.images import ImageFolder
from ddp_stream.sources.jsonl import JsonLines
from ddp_stream.sources.memory import InMemory, SyntheticRegression, TorchDataset
from ddp_stream.sources.npy import Npy, Npz
from ddp_stream.sources.open import open_source
from ddp_stream.sources.parquet import Parquet
from ddp_stream.sources.selection import exclude, skip_bad_rows
from ddp_stream.sources.tar import WebDataset
from ddp_stream.sources.tokens import Tokens

__all__ = [
    "Arrow",
    "CompressedText",
    "Csv",
    "DataError",
    "ForwardOnly",
    "HFDataset",
    "ImageFolder",
    "InMemory",
    "JsonLines",
    "Npy",
    "Npz",
    "Parquet",
    "Source",
    "SyntheticRegression",
    "Tokens",
    "TorchDataset",
    "WebDataset",
    "exclude",
    "open_source",
    "skip_bad_rows",
]
