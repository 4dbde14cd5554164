"""Headers of coded pictures: how many pictures a packet shows, and whether decoding may begin there.

Only what these answers need is read, as the codecs' specifications define it: H.264 (ITU-T H.264, 7.3), HEVC (ITU-T
H.265, 7.3), VP8 (RFC 6386, 9.1), VP9 (bitstream specification 6.2, annex B) and AV1 (bitstream specification 5.3, 5.9).
Where a header says anything else than the plain case, the answer is None: nothing is known of the packet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Picture:
    """The one picture of a packet.

    Attributes:
        is_shown: it is shown once; otherwise it is only referred to.
        is_start: what is shown from this picture on refers to nothing before it, and all packets before it are shown
            before it.
        is_leading: it follows a start in the file, and is shown before it.
    """

    is_shown: bool = True
    is_start: bool = False
    is_leading: bool = False


_SHOWN, _UNSHOWN, _START = Picture(), Picture(is_shown=False), Picture(is_start=True)
_LEADING = Picture(is_leading=True)

PictureReader = Callable[[bytes], Picture | None]


def picture_reader(codec: str, extradata: bytes) -> PictureReader | None:
    """Reader of a stream's packets; None where nothing is known of its codec or of its parameters.

    Args:
        codec: FFmpeg's name of it, such as h264.
        extradata: the stream's parameters, as the container stores them.
    """
    if codec in ("h264", "hevc"):
        return _nal_reader(codec, extradata)
    return _SIMPLE.get(codec)


# H.264 and HEVC: a packet is a list of NAL units.


@dataclass(frozen=True)
class _Nal:
    """A packet's NAL units; sets of parameters must be those of the container."""

    length_size: int  # bytes of the length before each unit; 0 where start codes divide them
    parameters: frozenset[bytes]

    def units(self, packet: bytes) -> Iterator[bytes]:
        """Raises ValueError when a length leads out of the packet."""
        return _after_lengths(packet, self.length_size) if self.length_size else _after_start_codes(packet)

    def is_known(self, unit: bytes) -> bool:
        return unit.rstrip(b"\0") in self.parameters


class _H264(_Nal):
    """IDR pictures are starts. Frames only: two packets may be the fields of one picture otherwise."""

    def __call__(self, packet: bytes) -> Picture | None:
        num_pictures, is_idr = 0, False
        for unit in self.units(packet):
            kind = unit[0] & 31
            if kind in (1, 5):  # slices
                if unit[1] & 0x80:  # first_mb_in_slice is 0
                    num_pictures += 1
                    is_idr = kind == 5
            elif kind in (2, 3, 4, 10, 11) or (kind in (7, 8) and not self.is_known(unit)):
                return None  # data partitions, the end of a sequence, other parameters
        if num_pictures != 1:
            return None
        return _START if is_idr else _SHOWN


class _Hevc(_Nal):
    """IDR and CRA pictures are starts; pictures of RASL and RADL kind lead the start before them."""

    def __call__(self, packet: bytes) -> Picture | None:
        num_pictures, kind_of_picture = 0, -1
        for unit in self.units(packet):
            kind, layer = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3
            if layer > 0:  # a second view or transparency, which is not decoded
                continue
            if kind <= 9 or kind in (19, 20, 21):
                if unit[2] & 0x80:  # first_slice_segment_in_pic_flag
                    num_pictures += 1
                    kind_of_picture = kind
                if kind > 9 and unit[2] & 0x40:  # no_output_of_prior_pics_flag
                    return None
            elif kind < 32 or kind in (36, 37) or (kind in (32, 33, 34) and not self.is_known(unit)):
                return None  # BLA pictures, the end of a sequence, other parameters
        if num_pictures != 1:
            return None
        if kind_of_picture > 9:
            return _START
        return _LEADING if kind_of_picture >= 6 else _SHOWN


def _nal_reader(codec: str, extradata: bytes) -> PictureReader | None:
    try:
        if extradata[:1] == b"\1":
            length_size, units = _avcc(extradata) if codec == "h264" else _hvcc(extradata)
        else:
            length_size, units = 0, list(_after_start_codes(extradata))
        known = frozenset(unit.rstrip(b"\0") for unit in units)
        if codec == "h264":
            plain = [_has_frames_only(unit) for unit in units if unit[0] & 31 == 7]
        else:
            plain = [_shows_every_picture(unit) for unit in units if unit[0] >> 1 & 63 == 34]
    except (IndexError, ValueError):
        return None
    if not plain or not all(plain):
        return None
    return _ending_quietly(_H264(length_size, known) if codec == "h264" else _Hevc(length_size, known))


def _ending_quietly(read: PictureReader) -> PictureReader:
    def read_or_none(packet: bytes) -> Picture | None:
        try:
            return read(packet)
        except (IndexError, ValueError):
            return None

    return read_or_none


def _after_lengths(data: bytes, size: int) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        end = place + size + int.from_bytes(data[place : place + size], "big")
        if end > len(data) or end == place + size:
            raise ValueError("a unit that is empty or longer than the packet")
        yield data[place + size : end]
        place = end


def _after_start_codes(data: bytes) -> Iterator[bytes]:
    place = data.find(b"\0\0\1")
    while place >= 0:
        following = data.find(b"\0\0\1", place + 3)
        yield data[place + 3 : following if following >= 0 else len(data)]
        place = following


def _avcc(data: bytes) -> tuple[int, list[bytes]]:
    """The size of lengths, and the sets of parameters (ISO/IEC 14496-15, 5.3.3.1)."""
    units: list[bytes] = []
    place = 5
    for mask in (31, 255):  # sequence, picture
        count = data[place] & mask
        place += 1
        place = _take_units(data, place, count, units)
    return (data[4] & 3) + 1, units


def _hvcc(data: bytes) -> tuple[int, list[bytes]]:
    """The same (ISO/IEC 14496-15, 8.3.3.1)."""
    units: list[bytes] = []
    place = 23
    for _ in range(data[22]):
        count = int.from_bytes(data[place + 1 : place + 3], "big")
        place = _take_units(data, place + 3, count, units)
    return (data[21] & 3) + 1, units


def _take_units(data: bytes, place: int, count: int, units: list[bytes]) -> int:
    for _ in range(count):
        end = place + 2 + int.from_bytes(data[place : place + 2], "big")
        if end > len(data):
            raise ValueError("parameters that are cut off")
        units.append(data[place + 2 : end])
        place = end
    return place


class _Bits:
    """Bits of a NAL unit, most significant first."""

    def __init__(self, unit: bytes) -> None:
        payload = unit.replace(b"\0\0\3", b"\0\0")  # the bytes that keep start codes out of it
        self._bits = "".join(f"{byte:08b}" for byte in payload)
        self._place = 0

    def read(self, count: int) -> int:
        self._place += count
        if self._place > len(self._bits):
            raise ValueError("parameters that are cut off")
        return int(self._bits[self._place - count : self._place] or "0", 2)

    def golomb(self) -> int:
        """An Exp-Golomb number without sign."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


_H264_PROFILES_WITH_CHROMA = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)


def _has_frames_only(unit: bytes) -> bool:
    """frame_mbs_only_flag of an H.264 sequence parameter set (7.3.2.1.1)."""
    bits = _Bits(unit)
    bits.read(8)
    profile = bits.read(8)
    bits.read(16)
    bits.golomb()
    if profile in _H264_PROFILES_WITH_CHROMA:
        chroma_format = bits.golomb()
        if chroma_format == 3:
            bits.read(1)
        bits.golomb()
        bits.golomb()
        bits.read(1)
        if bits.read(1):
            for number in range(12 if chroma_format == 3 else 8):
                if bits.read(1):
                    _skip_scaling_list(bits, 16 if number < 6 else 64)
    bits.golomb()
    order_type = bits.golomb()
    if order_type == 0:
        bits.golomb()
    elif order_type == 1:
        bits.read(1)
        bits.golomb()
        bits.golomb()
        for _ in range(bits.golomb()):
            bits.golomb()
    bits.golomb()
    bits.read(1)
    bits.golomb()
    bits.golomb()
    return bits.read(1) == 1


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.golomb()
            following = (last + (-(code // 2) if code % 2 == 0 else (code + 1) // 2)) % 256
        last = following or last


def _shows_every_picture(unit: bytes) -> bool:
    """Accept an HEVC picture parameter set with output_flag_present_flag 0 (7.3.2.3.1): no picture is hidden."""
    bits = _Bits(unit)
    bits.read(16)
    bits.golomb()
    bits.golomb()
    bits.read(1)
    return bits.read(1) == 0


# The other codecs: a packet is a picture, or a few of which one is shown.


def _vp8(packet: bytes) -> Picture | None:
    is_key = packet[0] & 1 == 0
    is_shown = packet[0] >> 4 & 1 == 1
    return _picture(is_shown, is_key)


def _vp9(packet: bytes) -> Picture | None:
    shown, first_is_key = 0, False
    for number, frame in enumerate(_vp9_frames(packet)):
        bits = _Bits(frame[:2])
        if bits.read(2) != 2:
            return None
        profile = bits.read(1) + 2 * bits.read(1)
        if profile == 3:
            bits.read(1)
        if bits.read(1):  # a picture that was decoded before
            shown += 1
            continue
        is_key, is_shown = not bits.read(1), bits.read(1) == 1
        shown += is_shown
        if number == 0:
            first_is_key = is_key and is_shown
    return _picture(shown, first_is_key)


def _vp9_frames(packet: bytes) -> Iterator[bytes]:
    marker = packet[-1]
    count, size = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = packet[-(2 + count * size) :]
    if marker >> 5 != 6 or len(index) != 2 + count * size or index[0] != marker:
        yield packet
        return
    place = 0
    for number in range(count):
        length = int.from_bytes(index[1 + number * size : 1 + (number + 1) * size], "little")
        yield packet[place : place + length]
        place += length


def _av1(packet: bytes) -> Picture | None:
    shown, first_is_key, has_sequence, num_frames = 0, False, False, 0
    for kind, payload in _av1_units(packet):
        if kind == 1:  # sequence header
            if payload[0] >> 4 & 1:  # a still picture
                return None
            has_sequence = True
        elif kind in (3, 6):  # frame header, frame
            num_frames += 1
            if payload[0] & 0x80:  # a picture that was decoded before
                shown += 1
                continue
            is_shown = payload[0] >> 4 & 1
            shown += is_shown
            if num_frames == 1:
                first_is_key = payload[0] >> 5 & 3 == 0 and is_shown == 1
        elif kind in (7, 8):  # a header again, a list of tiles
            return None
    return _picture(shown, has_sequence and first_is_key)


def _av1_units(packet: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(packet):
        header = packet[place]
        if header & 0x84:  # the forbidden bit, or layers
            raise ValueError("a unit that is damaged or of a layer")
        place += 1
        length = len(packet) - place
        if header & 2:
            length = shift = 0
            while True:
                byte = packet[place]
                place += 1
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
        yield header >> 3 & 15, packet[place : place + length]
        place += length


def _picture(num_shown: int, is_key: bool) -> Picture | None:
    """Picture of a packet that shows so many pictures and may begin with a shown key frame."""
    if num_shown > 1:
        return None
    return _UNSHOWN if num_shown == 0 else _START if is_key else _SHOWN


def _mjpeg(packet: bytes) -> Picture | None:
    return _START if b"\xff\xc4" in packet and b"\xff\xdb" in packet else _SHOWN  # it has tables of its own


def _intra(packet: bytes) -> Picture | None:
    return _START


_SIMPLE: dict[str, PictureReader] = {
    "vp8": _ending_quietly(_vp8),
    "vp9": _ending_quietly(_vp9),
    "av1": _ending_quietly(_av1),
    "mjpeg": _mjpeg,
    "prores": _intra,
    "dnxhd": _intra,
}
