"""Synthesised speech: ten invented words in many voices, so that speech models can be tried without data.

Source and filter (Fant 1960, "Acoustic theory of speech production"): a voice (a sawtooth, whose spectrum falls by
6 dB an octave, as the glottis and the lips together do) or noise, shaped by the resonances of the mouth. Every phone
is one or two rows of a table; what a frame of 8 ms gets is the table smoothed over time, so that the formants glide
from phone to phone. Vowel formants: Peterson and Barney 1952, "Control methods used in a study of the vowels", men.

Utterance i is a function of i alone (law 1). Shapes: F frames of 8 ms, Q = 257 frequencies, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray

from selfsup.kernel.contracts import Sample
from selfsup.kernel.random import Stream, stream

Array = NDArray[np.floating[Any]]
RATE = 16000
HOP, WINDOW, SPAN = 128, 256, 512  # samples: between frames, of source in a frame, of what it becomes when filtered
FREQUENCIES = np.linspace(0, RATE / 2, SPAN // 2 + 1, dtype=np.float32)  # [Q] Hz
BELL = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
WORDS = ("masu", "kila", "doxi", "nexa", "tibo", "ruga", "zemu", "fani", "pole", "wika")  # x is sh
COUNT = 480  # utterances
UNITS = 32  # random numbers for everything but the noise: see `utterance`


class Phone(NamedTuple):
    """One steady stretch of sound."""

    seconds: float
    formants: tuple[float, float, float]  # Hz
    voice: float = 0.0  # loudness of the voice
    noise: float = 0.0  # loudness of the noise
    centre: float = 4000.0  # Hz, of the noise
    band: float = 2000.0  # Hz, width of the noise


LIPS, TEETH, PALATE = (350.0, 900.0, 2200.0), (350.0, 1750.0, 2600.0), (350.0, 1950.0, 2350.0)
PHONES: dict[str, tuple[Phone, ...]] = {
    "i": (Phone(0.13, (270, 2290, 3010), 0.8),),
    "e": (Phone(0.13, (530, 1840, 2480), 1.0),),
    "a": (Phone(0.15, (730, 1090, 2440), 1.0),),
    "o": (Phone(0.14, (570, 840, 2410), 1.0),),
    "u": (Phone(0.13, (300, 870, 2240), 0.8),),
    "m": (Phone(0.08, (250, 1000, 2200), 0.35),),
    "n": (Phone(0.08, (250, 1450, 2500), 0.35),),
    "l": (Phone(0.07, (360, 1100, 2700), 0.55),),
    "r": (Phone(0.07, (310, 1060, 1380), 0.55),),
    "w": (Phone(0.07, (290, 610, 2150), 0.55),),
    "s": (Phone(0.12, TEETH, 0.0, 0.30, 5800, 2200),),
    "z": (Phone(0.10, TEETH, 0.25, 0.20, 5800, 2200),),
    "x": (Phone(0.12, PALATE, 0.0, 0.35, 2900, 1300),),
    "f": (Phone(0.11, LIPS, 0.0, 0.10, 5000, 6000),),
    "p": (Phone(0.07, LIPS), Phone(0.024, LIPS, 0.0, 0.4, 900, 900)),
    "t": (Phone(0.07, TEETH), Phone(0.032, TEETH, 0.0, 0.5, 4200, 2500)),
    "k": (Phone(0.07, PALATE), Phone(0.040, PALATE, 0.0, 0.5, 1900, 800)),
    "b": (Phone(0.07, LIPS, 0.10), Phone(0.016, LIPS, 0.2, 0.3, 900, 900)),
    "d": (Phone(0.07, TEETH, 0.10), Phone(0.016, TEETH, 0.2, 0.35, 4200, 2500)),
    "g": (Phone(0.07, PALATE, 0.10), Phone(0.016, PALATE, 0.2, 0.35, 1900, 800)),
    " ": (Phone(0.15, (500, 1500, 2500)),),
}


class Speech(Sequence[Sample]):
    """The built-in sample: {"audio": {"array" float32 [N], "sampling_rate": 16000}, "label": which word, 0 to 9}.

    Each utterance says one word two or three times, with pauses, in a voice, tempo and melody of its own.
    """

    def __len__(self) -> int:
        return COUNT

    @property
    def labels(self) -> list[int]:
        """The label of each utterance, without speaking it."""
        return [index % len(WORDS) for index in range(COUNT)]

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(COUNT))]
        if not -COUNT <= index < COUNT:
            raise IndexError(f"the sample has {COUNT} utterances; there is none numbered {index}")
        index %= COUNT
        wave = utterance(WORDS[index % len(WORDS)], stream(0, "synthesised speech", torch.tensor([index])))
        return {"audio": {"array": wave, "sampling_rate": RATE}, "label": index % len(WORDS)}


def utterance(word: str, draw: Stream) -> NDArray[np.float32]:
    """Say a word two or three times in a random voice: float32 [N], 1 to 3 s."""
    u: Array = draw.uniform(UNITS)[0].double().numpy()
    text = " " + f"{word} " * (2 + int(u[0] < 0.5))
    tract = 0.9 + 0.3 * u[1]  # a short mouth raises all formants, and goes with a high voice
    tempo = 0.75 + 0.45 * u[2]
    track = smooth_track(text, tempo, 0.8 + 0.4 * u[3:][: len(text)]).astype(np.float32)  # [F, 7]
    formants = track[:, :3] * np.float32(tract)
    total = HOP * len(track) + WINDOW
    noise: Array = (draw.uniform(total)[0] * 2 - 1).numpy()
    pitch = melody(total, 90 + 130 * (0.6 * u[1] + 0.4 * u[23]), u[24:28])
    voice = np.cumsum(pitch / RATE) % 1 * 2 - 1 + (0.02 + 0.06 * u[28]) * noise  # a sawtooth, and some breath
    spoken = spectra(voice, slice(None)) * (resonances(formants) * track[:, 3:4])  # [F, Q]
    hissed = np.flatnonzero(track[:, 4] > 0)
    shape = bands(track[hissed, 5:6] * np.float32(tract), track[hissed, 6:7]) * track[hissed, 4:5]
    spoken[hissed] += spectra(noise, hissed) * shape
    wave = overlapped(spoken)
    wave *= (0.2 + 0.6 * u[29]) / np.abs(wave).max()
    room = 10 ** (-3.5 + u[30])  # background noise, 70 to 50 dB below full scale
    out: NDArray[np.float32] = (wave + room * noise[: len(wave)]).astype(np.float32)
    return out


def smooth_track(text: str, tempo: float, stretch: Array) -> Array:
    """What each frame should sound like: [F, 7] = three formants, voice, noise, centre and band of the noise."""
    rows, lengths = [], []
    for letter, factor in zip(text, stretch, strict=False):
        for phone in PHONES[letter]:
            rows.append([*phone.formants, phone.voice, phone.noise, phone.centre, phone.band])
            lengths.append(max(2, round(phone.seconds * factor / tempo * RATE / HOP)))
    track: Array = np.repeat(np.array(rows), lengths, axis=0)
    track[:, :3] = smooth(track[:, :3], 7)  # 56 ms: the mouth moves
    loud = smooth(track[:, 3:5], 3)  # 24 ms: the throat switches
    # The colour of noise is that of the nearest noise: where there is none, the table says nothing about it.
    track[:, 5:] = smooth(track[:, 4:5] * track[:, 5:], 3) / np.maximum(loud[:, 1:], 1e-9)
    track[:, 3:5] = loud
    return track


def smooth(track: Array, width: int) -> Array:
    """Average over `width` frames, under a bell: [F, n] -> [F, n]."""
    bell = np.hanning(width + 2)[1:-1]
    padded = np.pad(track, ((width // 2, width // 2), (0, 0)), mode="edge")
    out: Array = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0) @ (bell / bell.sum())
    return out


def melody(total: int, base: float, u: Array) -> Array:
    """The pitch in Hz of every sample [N]: it falls by a sixth and sways twice, slowly and quickly."""
    t = np.arange(0, total, HOP) / RATE
    slow = 0.10 * np.sin(2 * np.pi * ((0.6 + 0.8 * u[0]) * t + u[1]))
    fast = 0.01 * np.sin(2 * np.pi * ((4.5 + 2 * u[2]) * t + u[3]))
    pitch: Array = base * (1.08 - 0.17 * t / t[-1]) * (1 + slow + fast)
    pitch = np.interp(np.arange(total), t * RATE, pitch)
    return pitch


def resonances(formants: Array) -> NDArray[np.complex64]:
    """The mouth's response: [F, 3] formants in Hz -> [F, Q]. Two more, from 3.5 and 4.5 kHz on, are added."""
    fourth = np.maximum(3500, formants[:, 2:] + 600)
    centres = np.concatenate([formants, fourth, fourth + 1000], 1).astype(np.float32)
    response: NDArray[np.complex64] = np.ones((len(formants), len(FREQUENCIES)), np.complex64)
    for centre in centres.T[:, :, None]:  # [F, 1]
        response *= (1 - (FREQUENCIES / centre) ** 2) + 1j * (FREQUENCIES * (50 / centre + 0.04) / centre)
    inverse: NDArray[np.complex64] = 1 / response
    return inverse


def bands(centre: Array, band: Array) -> NDArray[np.complex64]:
    """A bell over frequency around `centre` [F, 1], `band` [F, 1] wide, in Hz: [F, Q]; 2 ms late, to be causal."""
    bell = np.exp(-0.5 * ((FREQUENCIES - centre) / (0.5 * band)) ** 2)
    late: NDArray[np.complex64] = (bell * np.exp(-2j * np.pi * FREQUENCIES * 0.002)).astype(np.complex64)
    return late


def spectra(source: Array, which: Any) -> NDArray[np.complexfloating[Any, Any]]:
    """The spectra of these windowed frames of [N]: [F, Q]; the windows of two neighbours add up to 1."""
    frames = np.lib.stride_tricks.sliding_window_view(source.astype(np.float32), WINDOW)[:-1:HOP]  # [F, WINDOW]
    spectrum: NDArray[np.complexfloating[Any, Any]] = np.fft.rfft(frames[which] * BELL, SPAN)
    return spectrum


def overlapped(spectrum: NDArray[np.complexfloating[Any, Any]]) -> Array:
    """Back to sound, each frame added to the tails of those before it: [F, Q] -> [HOP * F]."""
    parts = np.fft.irfft(spectrum, SPAN).reshape(len(spectrum), -1, HOP)  # [F, SPAN / HOP, HOP]
    wave = np.zeros((len(parts) + parts.shape[1], HOP), parts.dtype)
    for k in range(parts.shape[1]):
        wave[k : k + len(parts)] += parts[:, k]
    out: Array = wave[: len(parts)].ravel()
    return out
