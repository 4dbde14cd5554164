"""The order in which a video's packets are shown, read off their times and headers, without decoding.

A video is only ever read from its first byte on: a container's own seeking lands at other places in half of them. What
is saved is the decoding of what lies before the wanted frames. It may begin at packets of which the codec promises that
nothing shown later refers to anything before them (`mm.data.bitstream`). Where any of this is not plain (a packet
without a time, two of one time, fields, parameters that change, a codec not known there) there is no `Order`, and the
video is decoded from its first packet on.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from mm.data.bitstream import Picture, picture_reader


@dataclass(frozen=True, slots=True)
class Order:
    """A video's packets in the order in which they are shown.

    Attributes:
        packets: the number in the file of each frame's packet.
        starts: where decoding may begin, as (frame, packet), ascending: begun at the packet, every frame from this one
            on comes as it does when all is decoded.
        times: of the frames, in seconds.
        delay: by how many frames the decoder may have to wait for one that is shown before.
    """

    packets: tuple[int, ...]
    starts: tuple[tuple[int, int], ...]
    times: tuple[float, ...]
    delay: int

    def start_before(self, frame: int) -> tuple[int, int]:
        """The last start that a frame can be decoded from."""
        return self.starts[bisect_right(self.starts, frame, key=lambda start: start[0]) - 1]


class Packet(NamedTuple):
    """A packet of a video.

    Attributes:
        time: when it is shown, in the stream's time base.
        is_hidden: the container says not to show it (an edit list).
        is_key: the container says that decoding may begin with it.
        is_incomplete: the container misses some of its bytes.
        picture: what it shows, if that is known.
    """

    time: int | None
    is_hidden: bool
    is_key: bool
    is_incomplete: bool
    picture: Picture | None


def read_packets(container: Any, stream: Any) -> list[Packet]:
    """All packets of a stream, read from where its PyAV container stands to the end."""
    context = stream.codec_context
    read = picture_reader(context.codec.canonical_name, bytes(context.extradata or b""))
    packets = []
    for packet in container.demux(stream):
        time = packet.pts
        if not packet.size and time is None and packet.dts is None:  # the one that ends a stream
            continue
        picture = None
        if read is not None:
            if packet.is_corrupt or packet.has_sidedata("new_extradata"):
                read = None
            else:
                picture = read(bytes(packet))
        packets.append(Packet(time, packet.is_discard, packet.is_keyframe, packet.is_corrupt, picture))
    return packets


def lost_packet(packets: Sequence[Packet]) -> int | None:
    """The number of a packet from which on a video is damaged, since bytes are missing there.

    Where a transport stream was joined of two, bytes seem to be missing too, one packet early; but a key frame follows.
    """
    for number, packet in enumerate(packets):
        if packet.is_incomplete and not any(following.is_key for following in packets[number + 1 : number + 3]):
            return number
    return None


def order_of(packets: Sequence[Packet], time_base: Fraction, delay: int) -> Order | None:
    """The order of packets; None where it is not certain.

    Args:
        packets: as `read_packets` gives them.
        time_base: seconds that a unit of their times stands for.
        delay: frames that the decoder holds back before it shows the first one.
    """
    if not packets or any(packet.picture is None for packet in packets):
        return None
    pictures = [packet.picture for packet in packets if packet.picture is not None]
    shown = [number for number, picture in enumerate(pictures) if picture.is_shown]
    times = {number: time for number in shown if (time := packets[number].time) is not None}
    if len(times) < len(shown) or len(set(times.values())) < len(times) or _depth(list(times.values())) > delay:
        return None
    frames = sorted((number for number in shown if not packets[number].is_hidden), key=times.__getitem__)
    starts = _starts(pictures, frames)
    if not frames or not starts or starts[0][0] > 0:
        return None
    unit = float(time_base)
    return Order(tuple(frames), tuple(starts), tuple(times[number] * unit for number in frames), delay)


def _depth(times: Sequence[int]) -> int:
    """Largest number of packets that come before one that is shown earlier."""
    depth = 0
    seen: list[int] = []
    for time in times:
        insort(seen, time)
        depth = max(depth, len(seen) - bisect_right(seen, time))
    return depth


def _starts(pictures: Sequence[Picture], frames: Sequence[int]) -> list[tuple[int, int]]:
    """Starts, as (frame, packet); none where the times contradict what the headers promise of one of them.

    What comes before a start, and what leads it, must be the very frames that are shown before it.
    """
    place = {packet: frame for frame, packet in enumerate(frames)}
    starts: list[tuple[int, int]] = []
    before, latest = 0, -1
    for number, picture in enumerate(pictures):
        if picture.is_start:
            leading = _leading(pictures, number, place)
            frame = before + len(leading)
            if latest >= frame or any(place[packet] >= frame for packet in leading):
                return []
            if leading and not starts:  # shown only where something comes before
                return []
            starts.append((frame, number))
        if number in place:
            before += 1
            latest = max(latest, place[number])
    return starts if starts and starts[0][1] == 0 else []


def _leading(pictures: Sequence[Picture], start: int, place: dict[int, int]) -> list[int]:
    """The shown packets that lead a start."""
    leading = []
    for number in range(start + 1, len(pictures)):
        if pictures[number].is_start:
            break
        if pictures[number].is_leading and number in place:
            leading.append(number)
    return leading
