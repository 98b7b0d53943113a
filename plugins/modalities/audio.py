"""Sound as a waveform, mono at one rate; the stem is wav2vec 2.0's convolutional encoder.

Recipe: Baevski, Zhou, Mohamed, Auli 2020, "wav2vec 2.0", https://arxiv.org/abs/2006.11477: 16 kHz, random crops of
250,000 samples (15.6 s). Every utterance is scaled to zero mean and unit variance. fairseq does so for the large
model only (`normalize: false` for base); transformers does it for both. For base it is the same but for the ε of
the normalisation that follows the first convolution, which removes offset and scale anyway, and quiet recordings
no longer drown in that ε; so it is on here.

Raw sample: float32 [N]. Signal: x [B, N] float32, segments [B, N] int32 (1 sound, 0 padding; None without padding).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfsup.kernel.config import about
from selfsup.kernel.contracts import Draw, Modality, Sample, Shown, Signal
from selfsup.kernel.errors import BadSample, ConfigError, DataError
from selfsup.plugins.common.conv_encoder import LAYERS, ConvEncoder, Layer, receptive_field
from selfsup.plugins.common.speech import Speech

Wave = NDArray[np.float32]
FLOOR = 1e-7  # added to the variance, as transformers' feature extractor does: silence stays finite
CROSSINGS, ROLLOFF = 16, 0.99  # of the resampling filter: zero crossings on each side, share of the band kept
RATES = (100, 400_000)  # Hz; beyond lies damage, and a resampling filter that would fill the memory
TINY = 128  # bytes; fewer hold no sound, and libsndfile, looking for tags, would seek to before the start
USUAL = 48_000  # Hz; max_seconds at this rate is what a decoded file may fill: 4 bytes a sample
BLOCK = 1 << 20  # values decoded at a time, before channels are averaged
ENDLESS = (0, 0x7FFFFFFF, 0xFFFFFFFF)  # data sizes that programs write which do not know the length yet


class Audio(Modality):
    """Waveforms. Reads what libsndfile reads; files of any rate and number of channels."""

    field: ClassVar[str] = "audio"
    suffixes: ClassVar[tuple[str, ...]] = (
        *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
        *(".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"),
    )
    unit: ClassVar[str | None] = "s of audio"

    def __init__(
        self,
        *,
        rate: Annotated[int, about("samples per second; everything is resampled to it", ge=100)] = 16000,
        longest: Annotated[float, about("seconds; a longer clip is cropped, at random in training", gt=0)] = 15.625,
        shortest: Annotated[float, about("seconds; a shorter clip is a bad sample", ge=0)] = 0.1,
        max_seconds: Annotated[
            float, about("a longer file, or one of as many samples as these at 48 kHz, is a bad sample", gt=0)
        ] = 3600.0,
        normalize: Annotated[bool, about("zero mean and unit variance in every clip")] = True,
        layers: Annotated[tuple[Layer, ...], about("[channels, kernel, stride] of each convolution")] = LAYERS,
        conv_norm: Annotated[
            Literal["group", "layer"], about("group: first layer, over time (base); layer: every layer (large)")
        ] = "group",
        conv_bias: Annotated[
            bool, about("whether convolutions have a bias; those before a group norm never do")
        ] = False,
    ) -> None:
        self.rate, self.longest, self.shortest, self.max_seconds = rate, longest, shortest, max_seconds
        self.normalize, self.layers, self.conv_norm, self.conv_bias = normalize, layers, conv_norm, conv_bias
        seen = receptive_field(layers)
        if self.crop < seen:
            raise ConfigError(f"longest = {longest} s is {self.crop} samples, but one frame of the stem sees {seen}")

    @property
    def crop(self) -> int:
        """The most samples that a clip keeps."""
        return round(self.longest * self.rate)

    def read(self, stored: Any) -> Tensor:
        """Decode into float32 [N]: mono, at `rate`, finite, normalised.

        Takes a path, the bytes of a file, {"bytes", "path"} (either may be None), {"array", "sampling_rate"}, or an
        array or tensor at `rate`: [N], or [N, channels] either way round (the longer axis is time); float in
        [-1, 1], or int16 or int32 of full scale. Raises BadSample with the reason.
        """
        if isinstance(stored, Mapping) and stored.get("array") is not None:
            wave, rate = from_array(stored["array"]), stored.get("sampling_rate")
            if not isinstance(rate, int | np.integer) or rate < 1:
                raise BadSample(f"an array needs its sampling_rate in samples per second; it has {rate!r}")
        elif isinstance(stored, np.ndarray | Tensor):
            wave, rate = from_array(stored), self.rate
        else:
            wave, rate = decode(stored, self.max_seconds)
        return torch.from_numpy(self._prepare(wave, int(rate)))

    def _prepare(self, wave: Wave, rate: int) -> Wave:
        if len(wave) == 0:
            raise BadSample("it holds no samples")
        check_length(len(wave), rate, self.max_seconds)
        bad = len(wave) - int(np.isfinite(wave).sum())
        if bad:
            raise BadSample(f"{bad} of {len(wave)} samples are NaN or infinite")
        least = max(round(self.shortest * self.rate), receptive_field(self.layers))
        wave = resample(wave, rate, self.rate)
        if len(wave) < least:
            raise BadSample(f"{len(wave) / self.rate:.3f} s is too short; the least is {least / self.rate:g} s")
        if not self.normalize:
            return wave
        mean, variance = wave.mean(dtype=np.float64), wave.var(dtype=np.float64)
        scaled: Wave = ((wave - mean) / np.sqrt(variance + FLOOR)).astype(np.float32)
        return scaled

    def collate(self, raws: Sequence[Tensor], draw: Draw | None = None) -> Signal:
        """Crop to `longest` (from the start without `draw`) and pad with zeros to the longest: x [B, N]."""
        spare = [max(0, len(raw) - self.crop) for raw in raws]
        share = draw("crop").uniform().tolist() if draw is not None else [0.0] * len(raws)
        clips = [
            raw[(start := int(u * (s + 1))) : start + self.crop] for raw, u, s in zip(raws, share, spare, strict=True)
        ]
        lengths = torch.tensor([len(clip) for clip in clips])  # [B]
        total = int(lengths.max())
        x = torch.zeros(len(clips), total)  # [B, N]
        for row, clip in zip(x, clips, strict=True):
            row[: len(clip)] = clip
        if int(lengths.min()) == total:
            return Signal(x)
        return Signal(x, (torch.arange(total) < lengths[:, None]).int())

    def stem(self, width: int) -> ConvEncoder:
        """The convolutional encoder of wav2vec 2.0."""
        return ConvEncoder(width, self.layers, self.conv_norm, self.conv_bias)

    def amount(self, signal: Signal) -> float:
        """Seconds of sound, without padding."""
        samples = signal.x.numel() if signal.segments is None else int((signal.segments > 0).sum())
        return samples / self.rate

    def show(self, signal: Signal) -> list[Shown]:
        """The waveforms, without padding."""
        waves = signal.x.detach().float().cpu()
        if signal.segments is None:
            return list(waves.numpy())
        lengths = (signal.segments > 0).sum(1).tolist()
        return [wave[:length].numpy() for wave, length in zip(waves, lengths, strict=True)]

    def sample(self) -> Sequence[Sample]:
        """480 synthesised utterances of ten invented words by many voices, 1 to 3 s; the label is the word."""
        return Speech()


def from_array(array: Any) -> Wave:
    """Mono float32 [N] of an array [N], [N, channels] or [channels, N]."""
    wave = np.asarray(array)
    if wave.ndim not in (1, 2) or wave.dtype.kind not in "fi":
        raise BadSample(f"a waveform is a float or int array [N] or [N, channels]; this is {wave.dtype} {wave.shape}")
    if wave.dtype.kind == "i":
        wave = wave / np.float32(np.iinfo(wave.dtype).max + 1)
    if wave.ndim == 2:
        wave = wave.mean(int(np.argmin(wave.shape)))
    return wave.astype(np.float32)


def decode(stored: Any, max_seconds: float) -> tuple[Wave, int]:
    """Mono float32 [N] and its rate, of a path, bytes, or {"bytes", "path"}."""
    if isinstance(stored, Mapping):
        stored = stored["bytes"] if stored.get("bytes") is not None else stored.get("path")
    try:
        if isinstance(stored, bytes):
            check_whole(io.BytesIO(stored), len(stored))
            return decode_whole(io.BytesIO(stored), max_seconds)
        if isinstance(stored, str | Path):
            if os.path.exists(stored) and not os.path.isfile(stored):  # a pipe would be waited for
                raise BadSample("this is a directory or a device, not a file")
            with open(stored, "rb") as file:
                check_whole(file, os.fstat(file.fileno()).st_size)
            return decode_whole(str(stored), max_seconds)
    except OSError as cause:
        raise BadSample(f"it cannot be opened: {cause.strerror or cause}") from None
    raise BadSample(f"sound is stored as a path, bytes or an array; this is {type(stored).__name__}")


def decode_whole(file: str | BinaryIO, max_seconds: float) -> tuple[Wave, int]:
    """Mono float32 [N] and its rate, of a file that `check_whole` has passed."""
    try:
        import soundfile  # type: ignore[import-untyped]
    except (ImportError, OSError) as cause:
        raise DataError(f"reading sound files needs soundfile ({cause}): pip install 'selfsup[audio]'") from None
    try:
        with soundfile.SoundFile(file) as sound:
            rate, promised = int(sound.samplerate), int(sound.frames)
            check_length(promised, rate, max_seconds)
            wave, filled = np.empty(promised, np.float32), 0
            # In blocks: all channels of an hour would take gigabytes.
            while filled < promised:
                block = sound.read(min(BLOCK // sound.channels, promised - filled), "float32", always_2d=True)
                if not len(block):
                    break
                wave[filled : filled + len(block)] = block[:, 0] if block.shape[1] == 1 else block.mean(1)
                filled += len(block)
    except (soundfile.SoundFileError, RuntimeError) as cause:
        raise BadSample(f"it cannot be decoded as sound: {cause}") from None
    if filled < promised:
        raise BadSample(f"the file is truncated: {filled} of {promised} samples can be decoded")
    return wave, rate


def check_length(samples: int, rate: int, max_seconds: float) -> None:
    """Refuse what a header promises before memory is set aside for it."""
    if not RATES[0] <= rate <= RATES[1]:
        raise BadSample(f"its rate of {rate} Hz is outside {RATES[0]} to {RATES[1]} Hz")
    if samples > max_seconds * rate:
        raise BadSample(f"{samples / rate:.0f} s is longer than max_seconds = {max_seconds:g}")
    if samples > max_seconds * USUAL:
        raise BadSample(f"{samples:,} samples are more than max_seconds = {max_seconds:g} has at {USUAL} Hz")


def check_whole(file: BinaryIO, size: int) -> None:
    """Refuse a file of `size` bytes that is empty or ends before the sound that its header promises."""
    if size < TINY:
        raise BadSample("the file is empty" if size == 0 else f"the file holds no sound, only {size} bytes")
    missing = missing_bytes(file, size)
    if missing:
        raise BadSample(f"the file is truncated: its header promises {missing} bytes more")


def missing_bytes(file: BinaryIO, size: int) -> int:
    """How many bytes of the sound data of a WAV or AIFF file lie past its end; 0 for other formats.

    libsndfile shortens such a file in silence.
    """
    head = file.read(12)
    wav, aiff = head[:4] == b"RIFF" and head[8:] == b"WAVE", head[:4] == b"FORM" and head[8:11] == b"AIF"
    at, order = 12, "little" if wav else "big"
    while (wav or aiff) and at + 8 <= size:
        file.seek(at)
        name, length = file.read(4), int.from_bytes(file.read(4), order)  # type: ignore[arg-type]
        if name in (b"data", b"SSND"):
            return 0 if length in ENDLESS else max(0, at + 8 + length - size)
        at += 8 + length + length % 2
    return 0


def resample(wave: Wave, old: int, new: int) -> Wave:
    """Band-limited interpolation of [N] at rate `old` -> [ceil(N * new / old)] at rate `new`.

    Smith 1984, "Digital audio resampling", https://ccrma.stanford.edu/~jos/resample/: a sinc low-pass under a Hann
    window, cut off at `ROLLOFF` of the lower Nyquist frequency; one set of weights for each phase that occurs.
    """
    if old == new:
        return wave
    common = int(np.gcd(old, new))
    old, new = old // common, new // common
    weights, starts, half = phases(old, new)
    total = -(-len(wave) * new // old)
    padded = np.pad(wave, (half, half + old + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weights.shape[1])
    out = np.empty(total, np.float32)
    block = 1 << 16  # outputs at a time: the gathered windows of an hour would fill the memory
    for first in range(0, total, block):
        j = np.arange(first, min(first + block, total))
        gathered = windows[j // new * old + starts[j % new]]  # [block, taps]
        out[j] = np.einsum("jt,jt->j", gathered, weights[j % new])
    return out


@lru_cache(maxsize=16)
def phases(old: int, new: int) -> tuple[Wave, NDArray[np.int64], int]:
    """Weights [new, taps] of every phase, the first input sample that each reads less `half`, and `half`."""
    cut = ROLLOFF * min(1.0, new / old)  # of the input's Nyquist frequency
    half = int(np.ceil(CROSSINGS / cut))
    places = np.arange(new) * old / new  # of the outputs, in input samples
    starts = np.floor(places).astype(np.int64)
    offsets = (np.arange(2 * half + 2) - half)[None] - (places - starts)[:, None]  # [new, taps]
    window = np.cos(np.pi / 2 * np.clip(offsets * cut / CROSSINGS, -1, 1)) ** 2
    weights = np.sinc(cut * offsets) * window
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32), starts, half
