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
    track = smooth_track(text, tempo, 0.8 + 0.4 * u[3:][: len(text)])  # [F, 7]
    formants = track[:, :3] * tract
    total = HOP * len(track) + WINDOW
    noise: Array = (draw.uniform(total)[0] * 2 - 1).numpy()
    pitch = melody(total, 90 + 130 * (0.6 * u[1] + 0.4 * u[23]), u[24:28])
    voice = np.cumsum(pitch / RATE) % 1 * 2 - 1 + (0.02 + 0.06 * u[28]) * noise  # a sawtooth, and some breath
    wave = filtered(voice, resonances(formants) * track[:, 3:4])
    wave += filtered(noise, bands(track[:, 5:6] * tract, track[:, 6:7]) * track[:, 4:5])
    wave *= (0.2 + 0.6 * u[29]) / np.abs(wave).max()
    room = 10 ** (-3.5 + u[30])  # background noise, 70 to 50 dB below full scale
    return (wave + room * noise[: len(wave)]).astype(np.float32)


def smooth_track(text: str, tempo: float, stretch: Array) -> Array:
    """What each frame should sound like: [F, 7] = three formants, voice, noise, centre and band of the noise."""
    rows, lengths = [], []
    for letter, factor in zip(text, stretch, strict=False):
        for phone in PHONES[letter]:
            rows.append([*phone.formants, phone.voice, phone.noise, phone.centre, phone.band])
            lengths.append(max(2, round(phone.seconds * factor / tempo * RATE / HOP)))
    track: Array = np.repeat(np.array(rows), lengths, axis=0)
    slow, fast = np.hanning(9)[1:-1], np.hanning(5)[1:-1]  # 56 and 24 ms: the mouth moves, the throat switches
    for column in range(5):
        kernel = slow if column < 3 else fast
        padded = np.pad(track[:, column], len(kernel) // 2, mode="edge")
        track[:, column] = np.convolve(padded, kernel / kernel.sum(), mode="valid")
    return track


def melody(total: int, base: float, u: Array) -> Array:
    """The pitch in Hz of every sample [N]: it falls by a sixth and sways twice, slowly and quickly."""
    t = np.arange(total) / RATE
    fall = 1.08 - 0.17 * np.arange(total) / total
    slow = 0.10 * np.sin(2 * np.pi * ((0.6 + 0.8 * u[0]) * t + u[1]))
    fast = 0.01 * np.sin(2 * np.pi * ((4.5 + 2 * u[2]) * t + u[3]))
    pitch: Array = base * fall * (1 + slow + fast)
    return pitch


def resonances(formants: Array) -> NDArray[np.complex64]:
    """The mouth's response: [F, 3] formants in Hz -> [F, Q]; a fourth one at 3.5 kHz or above the third is added."""
    f = np.linspace(0, RATE / 2, SPAN // 2 + 1, dtype=np.float32)  # [Q]
    fourth = np.maximum(3500, formants[:, 2:] + 600)
    response = np.ones((len(formants), len(f)), np.complex64)
    for centre in np.concatenate([formants, fourth], 1).astype(np.float32).T[:, :, None]:  # [F, 1]
        response *= centre**2 - f**2 + 1j * f * (50 + 0.04 * centre)
    scale = np.prod(np.concatenate([formants, fourth], 1) ** 2, 1, keepdims=True)
    return (scale / response).astype(np.complex64)


def bands(centre: Array, band: Array) -> NDArray[np.float32]:
    """A bell over frequency around `centre` [F, 1], `band` [F, 1] wide, in Hz: [F, Q]."""
    f = np.linspace(0, RATE / 2, SPAN // 2 + 1, dtype=np.float32)
    return np.exp(-0.5 * ((f - centre) / (0.5 * band)) ** 2).astype(np.float32)


def filtered(source: Array, response: NDArray[Any]) -> Array:
    """Filter each frame of [N] by its row of [F, Q] and overlap the results: [HOP * F]."""
    starts = np.lib.stride_tricks.sliding_window_view(source, WINDOW)[::HOP][: len(response)]  # [F, WINDOW]
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)  # halves overlap to 1
    shaped = np.fft.irfft(np.fft.rfft(starts * window, SPAN) * response, SPAN)  # [F, SPAN]
    wave = np.zeros((len(response) + SPAN // HOP, HOP))
    for part in range(SPAN // HOP):
        wave[part : part + len(response)] += shaped[:, part * HOP : (part + 1) * HOP]
    out: Array = wave[: len(response)].ravel()
    return out
