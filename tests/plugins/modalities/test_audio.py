"""Reading, resampling, cropping and padding of sound; every way in which a file can be bad."""

import io
import os
import pickle
import sys

import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample_poly

from selfsup.kernel.config import check, to_toml
from selfsup.kernel.contracts import Signal
from selfsup.kernel.errors import BadSample, ConfigError, DataError
from selfsup.kernel.random import stream
from selfsup.plugins.modalities import audio as audio_module
from selfsup.plugins.modalities.audio import Audio, resample


def tone(hertz=440.0, seconds=0.5, rate=16000):
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def stored(wave, rate=16000, format="WAV", **options):
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format, **options)
    return file.getvalue()


def plain(**options):
    return Audio(normalize=False, **options)


@pytest.mark.parametrize(
    ("format", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("AIFF", 1e-4), ("OGG", 0.05), ("MP3", 0.1)]
)
def test_formats(format, tolerance, tmp_path):
    data = stored(tone(), format=format)
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(data)
    assert path.suffix in Audio.suffixes
    for form in (data, path, str(path), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}):
        x = plain().read(form)
        assert x.dtype == torch.float32
        np.testing.assert_allclose(x[1000:7000], tone()[1000:7000], atol=tolerance)


def test_arrays():
    expected = torch.from_numpy(tone())
    stereo = np.stack([tone() * 2, np.zeros(8000, np.float32)])
    for form in (
        tone(),
        expected,
        tone().astype(np.float64),
        stereo,
        stereo.T,
        {"array": tone(), "sampling_rate": 16000},
    ):
        torch.testing.assert_close(plain().read(form), expected)
    torch.testing.assert_close(plain().read((tone() * 32768).astype(np.int16)), expected, atol=1e-4, rtol=0)
    assert len(plain().read({"array": tone(rate=8000), "sampling_rate": 8000})) == 8000


def test_channels_are_averaged_and_any_rate_is_resampled():
    wave = np.stack([tone(rate=44100), np.zeros(22050, np.float32)], 1)
    x = plain().read(stored(wave, 44100))
    np.testing.assert_allclose(x[500:-500], tone()[500:-500] / 2, atol=1e-3)
    assert len(x) == 8000


def test_clips_are_normalised():
    x = Audio().read(tone() * 0.1 + 0.3)
    assert abs(float(x.mean())) < 1e-4
    assert float(x.std()) == pytest.approx(1, abs=5e-3)
    assert Audio().read(np.zeros(8000, np.float32)).abs().max() == 0  # silence is legal, and stays finite


@pytest.mark.parametrize(
    ("old", "new"), [(8000, 16000), (44100, 16000), (22050, 16000), (16000, 11025), (48000, 16000)]
)
def test_resampling_keeps_tones_below_and_rejects_those_above_the_band(old, new):
    for hertz in (100.0, 1000.0, 0.4 * min(old, new)):
        y = resample(tone(hertz, 1, old), old, new)
        assert len(y) == new
        exact, other = tone(hertz, 1, new), resample_poly(tone(hertz, 1, old), new, old)
        error = np.abs(y - exact)[300:-300].max()
        assert error < 0.4 * 3e-3
        assert error < 2 * np.abs(other[: len(y)] - exact)[300:-300].max() + 1e-4  # no worse than scipy's filter
    above = 0.5 * min(old, new) * 1.15
    if above < old / 2:
        assert np.abs(resample(tone(above, 1, old), old, new))[300:-300].max() < 0.4 * 1e-3  # 60 dB down


def test_resampling_an_odd_ratio_and_more_than_one_block():
    np.testing.assert_allclose(
        resample(tone(300, 0.2, 16001), 16001, 16000)[200:3000], tone(300, 0.2)[200:3000], atol=1e-3
    )
    y = resample(tone(1000, 9, 8000), 8000, 16000)  # 144,000 outputs: three blocks
    np.testing.assert_allclose(y[300:-300], tone(1000, 9)[300:-300], atol=1e-3)
    np.testing.assert_allclose(resample(np.full(4000, 0.5, np.float32), 44100, 16000)[50:-50], 0.5, atol=1e-6)


def nan():
    wave = tone()
    wave[5] = np.nan
    return wave


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "the file is empty"),
        (b"RIFF", "holds no sound, only 4 bytes"),
        (b"this is a text about sound" * 100, "cannot be decoded as sound"),
        (stored(tone())[:9000], "truncated: its header promises 7044 bytes more"),
        (stored(tone())[:-1], "truncated: its header promises 1 bytes more"),
        (stored(tone(), format="AIFF")[:-100], "truncated: its header promises 100 bytes more"),
        (stored(tone(), format="FLAC")[:-50], "cannot be decoded as sound|truncated"),
        (stored(tone(seconds=2), format="MP3")[:2000], "truncated: .* of 32000 samples"),
        (stored(nan(), subtype="FLOAT"), "1 of 8000 samples are NaN or infinite"),
        (np.full(8000, np.inf), "8000 of 8000 samples are NaN or infinite"),
        (stored(tone()[:0]), "holds no sound, only 44 bytes"),
        (np.zeros(0), "it holds no samples"),
        (tone(seconds=0.05), "0.050 s is too short; the least is 0.1 s"),
        ({"array": tone(), "sampling_rate": None}, "needs its sampling_rate"),
        (stored(tone(), rate=2**31 - 1), "rate of 2147483647 Hz is outside 100 to 400000 Hz"),
        (np.zeros((2, 3, 4)), r"float or int array \[N\]"),
        (np.array(["a"]), r"float or int array \[N\]"),
        ("nowhere.wav", "cannot be opened: No such file"),
        ({"bytes": None, "path": None}, "this is NoneType"),
        (stored(tone(seconds=3)), "3 s is longer than max_seconds = 2"),
        (tone(seconds=3), "3 s is longer than max_seconds = 2"),
    ],
)
def test_bad_samples_say_why(bad, reason):
    with pytest.raises(BadSample, match=reason):
        Audio(max_seconds=2.0).read(bad)


def test_a_high_rate_does_not_make_room_for_more_samples():
    silence = stored(np.zeros(150_000), 200_000, format="FLAC")
    with pytest.raises(BadSample, match="150,000 samples are more than max_seconds = 1 has at 48000 Hz"):
        Audio(max_seconds=1.0).read(silence)
    assert len(plain().read(silence)) == 12_000


def test_many_channels_are_decoded_in_blocks(monkeypatch):
    wave = np.stack([tone(), tone(200), -tone()], 1)
    whole = plain().read(stored(wave))
    monkeypatch.setattr(audio_module, "BLOCK", 1000)
    np.testing.assert_allclose(plain().read(stored(wave)), whole, atol=1e-7)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(BadSample, match="a device, not a file"):
        Audio().read(tmp_path / "pipe.wav")


def test_the_sound_is_found_behind_chunks_of_odd_length():
    data = stored(tone())
    tagged = data[:36] + b"note\x03\x00\x00\x00abc\x00" + data[36:]
    assert len(Audio().read(tagged)) == 8000
    with pytest.raises(BadSample, match="promises 10 bytes more"):
        Audio().read(tagged[:-10])


def test_headers_that_leave_the_length_open_are_read():
    data = bytearray(stored(tone()))
    data[40:44] = data[4:8] = b"\xff\xff\xff\xff"
    assert len(Audio().read(bytes(data))) == 8000


def test_without_soundfile_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(DataError, match=r"pip install 'selfsup\[audio\]'") as caught:
        Audio().read(stored(tone()))
    assert not isinstance(caught.value, BadSample)


def test_padding_and_segments():
    audio = Audio()
    raws = [torch.ones(n) for n in (5000, 8000, 3000)]
    batch = audio.collate(raws)
    assert batch.x.shape == batch.segments.shape == (3, 8000)
    assert batch.segments.sum(1).tolist() == batch.x.sum(1).tolist() == [5000, 8000, 3000]
    assert audio.amount(batch) == 1.0
    even = audio.collate(raws[:1] * 2)
    assert even.segments is None
    assert audio.amount(even) == 0.625


def test_crops_are_random_only_with_a_stream_and_stay_inside():
    audio = Audio(longest=0.5)
    raw = torch.arange(20000.0)
    ids = torch.arange(64)
    assert audio.collate([raw]).x[0].equal(raw[:8000])
    cropped = audio.collate([raw] * 64, lambda purpose: stream(0, purpose, ids)).x
    starts = cropped[:, 0]
    assert cropped.shape == (64, 8000)
    assert (cropped - starts[:, None]).equal(raw[:8000].expand(64, -1))
    assert 0 <= starts.min() < 2000
    assert 10000 < starts.max() <= 12000
    alone = audio.collate([raw], lambda purpose: stream(0, purpose, ids[7:8])).x
    assert alone[0].equal(cropped[7])  # whatever the batch
    tight = audio.collate([raw[:8001]] * 64, lambda purpose: stream(0, purpose, ids)).x[:, 0]
    assert set(tight.tolist()) == {0.0, 1.0}  # the last place is as likely as the first
    short = audio.collate([raw[:4000]] * 64, lambda purpose: stream(0, purpose, ids)).x
    assert short.equal(raw[:4000].expand(64, -1))


def test_options_survive_a_run_file_and_reach_the_stem():
    import tomllib

    filled = check("modality", Audio, {"layers": [[16, 10, 5], [32, 3, 2]], "conv_norm": "layer", "conv_bias": True})
    again = check("modality", Audio, tomllib.loads(to_toml({"modality": filled}))["modality"])
    assert again == filled
    stem = Audio(**again).stem(24)
    assert stem.convs[1].conv.bias is not None
    assert stem(Signal(torch.randn(2, 200))).x.shape == (2, 19, 24)
    with pytest.raises(ConfigError, match="one frame of the stem sees 400"):
        Audio(longest=0.01)
    with pytest.raises(ConfigError, match=r"modality\.conv_norm"):
        check("modality", Audio, {"conv_norm": "batch"})


def test_sample_and_pickle():
    audio = pickle.loads(pickle.dumps(Audio(longest=2.0)))
    sample = pickle.loads(pickle.dumps(audio.sample()))
    batch = audio.collate([audio.read(sample[i][Audio.field]) for i in range(3)])
    out = audio.stem(16)(batch)
    assert out.x.shape[0] == 3
    assert torch.isfinite(out.x).all()


def test_people_see_the_waveforms_without_padding():
    modality = plain()
    raws = [torch.from_numpy(tone(seconds=s)) for s in (0.5, 0.25)]
    for clips in (raws, raws[:1]):
        shown = modality.show(modality.collate(clips))
        for wave, raw in zip(shown, clips, strict=True):
            np.testing.assert_array_equal(wave, raw.numpy())
