"""A live store: what an opened store offers, of features that are made when they are asked for."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from mm.config.data import TEMPORAL_STRIDE
from mm.config.model import WanConfig
from mm.config.run.extraction import ExtractionRun
from mm.data.clips import Clip, clip_bytes
from mm.data.dataset import as_listed, read_sample
from mm.data.features import Feature, Origin, serialised
from mm.data.listing import Digest, ListedSample, RowsOfDraw
from mm.data.metadata import VideoSample
from mm.data.open_store import SampleTensors
from mm.data.place import ClipPlace, FeaturePlace, Place
from mm.data.replacing import may_be_replaced
from mm.data.sources.checking import RowReader
from mm.data.store.blobs import Blob, parsed_feature
from mm.data.store.shard import LatentShape
from mm.data.store.writer import prompt_blob
from mm.errors import DataError
from mm.extract.encode import ClipEncoder
from mm.extract.live.index import LiveIndex
from mm.extract.live.kept import Kept
from mm.extract.live.parts import MadeSample, Parts
from mm.extract.plan import PLAN, Plan
from mm.extract.rows import listed_row, origin_of, rows_of

_SAMPLES_KNOWN = 1024
_CAPTIONS_KNOWN = 8


class Made:
    """Counts of samples that were made, and of those that were kept."""

    def __init__(self) -> None:
        self.encoded = 0
        self.kept = 0


class LiveStore:
    """Samples 0, 1, ... of a plan, those of the first draw first; where there are encoders, it makes their features."""

    def __init__(self, run: ExtractionRun, recipe_key: str, plan: Plan, reader: RowReader, index: LiveIndex) -> None:
        """
        Args:
            run: the extraction. recipe_key: of its features. plan, reader: its rows. index: of them.
        """
        self.folder = Path(run.output.path)
        self.recipe_key = recipe_key
        self._run, self._plan, self._reader, self._index = run, plan, reader, index
        self._kept = Kept(self.folder, plan)
        self._samples: OrderedDict[int, VideoSample] = OrderedDict()
        self._maker: _Maker | None = None

    def can_make(self, encoders: Callable[[], ClipEncoder], parts: Parts, made: Made) -> None:
        """Let it make features.

        Args:
            encoders: the loaded encoders, called when one is needed. parts: where features are kept.
            made: counts them.
        """
        self._maker = _Maker(self._run, self.recipe_key, encoders, parts, made)

    def __len__(self) -> int:
        return self._index.rows_of_draw * self.draws

    @property
    def draws(self) -> int:
        """Draws of each sample."""
        return self._index.draws

    @property
    def clip_bytes(self) -> int:
        """The most bytes that a clip takes, with what is beside it."""
        return clip_bytes(self._run.data.clip, self._run.task.media)

    def name(self, row: int) -> str:
        """The sample's id; this and all that follow raise what `mm.extract.rows.rows_of` raises."""
        return self._sample(row).id

    def latent_shape(self, row: int) -> LatentShape:
        """Shape (C, F, H, W) that the sample's latents have."""
        return self._index.latent_shape(row)

    def text_tokens(self, row: int) -> int:
        """Tokens of the sample's caption."""
        return self._index.text_tokens(row)

    def listed(self, row: int) -> ListedSample:
        """The sample's video and caption; its clip begins where its features say once they are made."""
        sample, caption = self._sample(row), self._caption(row)
        latent_frames = self.latent_shape(row)[1] - self._run.task.images_in_front(sample.roles)
        frames = (latent_frames - 1) * TEMPORAL_STRIDE + 1
        path = sample.annotation.path
        return ListedSample(sample=sample.id, path=path, cap=caption, start_frame_idx=0, sample_num_frames=frames)

    def shapes(self) -> Counter[LatentShape]:
        """Number of samples with each latent shape, in the order of the shapes' first samples."""
        return self._index.shapes()

    def of_draw(self, draw: int) -> RowsOfDraw:
        """The rows of one draw."""
        return self._index.of_draw(draw)

    def add_identity(self, digest: Digest) -> None:
        """Feed the names, clips, captions and videos of all samples to a digest, as the finished store does."""
        digest.update(f"{self._index.identity}\n".encode())

    def empty_prompt(self) -> Blob | None:
        """Place of the empty caption's embedding; where there are encoders it is made and kept if it is not there.

        Raises:
            DataError: DATA-018 and DATA-019 when it cannot be written.
        """
        found = self._kept.empty_prompt()
        if found is None and self._maker is not None:
            self._maker.keep_empty_prompt()
            found = self._kept.empty_prompt()
        return found

    def place(self, row: int) -> Place:
        """Place of the sample: where its features are kept, or its clip."""
        sample, caption, (draw, number) = self._sample(row), self._caption(row), self._draw(row)
        origin = origin_of(sample, draw, caption, self.recipe_key, self._index.fingerprint(number))
        planned = self._index.planned(number)
        blobs = self._kept.find(planned, draw, origin)
        if blobs is None and self._maker is not None and self._maker.end_part_of(origin):
            blobs = self._kept.find(planned, draw, origin)
        if blobs is not None:
            return self._place_of(blobs, sample, self.latent_shape(row))
        clip, seed = self._run.data.clip, self._run.extraction.seed
        shape, media = self.latent_shape(row), self._run.task.media
        return ClipPlace(self.folder, sample, draw, clip, seed, caption, origin, shape, row, media)

    def place_again(self, row: int, lost: Place) -> Place | None:
        """Another place of a sample whose kept features cannot be read; None for a clip that cannot be."""
        if isinstance(lost, ClipPlace) or lost.blobs is None:
            return None
        self._kept.lose(lost.blobs)
        return self.place(row)

    def make(self, place: ClipPlace, clip: Clip, model: WanConfig) -> SampleTensors:
        """Features of a clip; where they were kept since its place was told, these.

        Raises:
            DataError: what the encoders raise, and what reading features raises for the model.
        """
        if self._maker is None:
            raise ValueError("this process has no encoders")
        known = self._maker.known(place)
        if known is not None:
            return known
        _, number = self._draw(place.row)
        blobs = self._kept.find(self._index.planned(number), place.draw, place.origin)
        if blobs is not None:
            try:
                return read_sample(self._place_of(blobs, place.sample, place.latent_shape), model)
            except DataError as error:
                if not may_be_replaced(error):
                    raise
                self._kept.lose(blobs)
        return self._maker.make(place, clip, model)

    @property
    def is_all_kept(self) -> bool:
        """Tell whether it may be that all features are kept; counts alone are looked at."""
        return self._kept.samples_in_parts + self._kept.samples_in_shards >= len(self)

    def _place_of(self, blobs: tuple[Blob, Blob], sample: VideoSample, shape: LatentShape) -> FeaturePlace:
        file = str(Path(str(blobs[0].file)).relative_to(self.folder))
        return FeaturePlace(self.folder, file, sample.id, self.recipe_key, shape, blobs)

    def _draw(self, row: int) -> tuple[int, int]:
        """Draw of a row, and the sample's number in it."""
        return divmod(row, self._index.rows_of_draw)

    def _caption(self, row: int) -> str:
        return self._sample(row).caption(self._run.extraction.seed, self._draw(row)[0])

    def _sample(self, row: int) -> VideoSample:
        planned = self._index.planned(self._draw(row)[1])
        if planned not in self._samples:
            run, number = divmod(planned, self._plan.shard_rows)
            found = rows_of(self._plan, run, self._reader)[number].sample
            if found is None:
                raise ValueError("a row without a sample was let pass")
            self._samples[planned] = found
            if len(self._samples) > _SAMPLES_KNOWN:
                self._samples.popitem(last=False)
        return self._samples[planned]


class _Maker:
    """Makes features of clips, one by one as extraction does, and keeps them."""

    def __init__(
        self, run: ExtractionRun, recipe_key: str, encoders: Callable[[], ClipEncoder], parts: Parts, made: Made
    ) -> None:
        self._run, self._recipe_key, self._encoders = run, recipe_key, encoders
        self._parts, self._made = parts, made
        self._text_len = run.encoders.tokenizer.model_max_length
        self._prompt = lru_cache(maxsize=_CAPTIONS_KNOWN)(lambda caption: encoders().prompt(caption))

    def known(self, place: ClipPlace) -> SampleTensors | None:
        """A sample that this process made and nobody can read yet."""
        made = self._parts.open.get(place.origin)
        return None if made is None else _copy(made.tensors)

    def end_part_of(self, origin: Origin) -> bool:
        """End the open part where it holds a sample, so that the sample can be read; tells whether it did."""
        holds = origin in self._parts.open
        if holds:
            self._parts.end()
        return holds

    def make(self, place: ClipPlace, clip: Clip, model: WanConfig) -> SampleTensors:
        """Encode a clip; what comes out has passed through the contents that are written, as what is read has.

        Raises:
            DataError: DATA-240 for a video that is another than when it was looked at.
        """
        sample, prompt = place.sample, self._prompt(place.caption)
        if origin_of(sample, place.draw, place.caption, self._recipe_key) != place.origin:
            found = f"{sample.where} is another file than when {place.folder} was planned."
            remedy = f"Remove {place.folder / PLAN}, and start again: the rows and files are looked at anew."
            raise DataError("DATA-240", found, remedy)
        feature = self._encoders().encode(clip, prompt, sample.columns)
        contents = self._contents(place, feature, prompt)
        where = f'{sample.where} (sample "{sample.id}")'
        tensors = as_listed(parsed_feature(*contents, where, model), place, where)
        self._made.encoded += 1
        row = listed_row(
            sample,
            place.origin.video,
            place.caption,
            place.latent_shape,
            start_frame=feature.start_frame,
            text_tokens=len(prompt),
            task=self._run.task.name,
            taken=feature.taken,
        )
        self._made.kept += self._parts.keep(MadeSample(row, feature, place.origin, contents[1], tensors))
        return _copy(tensors)

    def keep_empty_prompt(self) -> None:
        """Make and keep the embedding of the empty caption."""
        prompt = self._prompt("")
        self._parts.keep_prompt("", prompt_blob("", prompt, self._text_len, self._recipe_key), len(prompt))

    def _contents(self, place: ClipPlace, feature: Feature, prompt: Tensor) -> tuple[bytes, bytes]:
        tensors = {} if feature.latents is None else {"latents": feature.latents}
        content = serialised({**feature.features, **tensors}, place.origin, feature, f'sample "{place.sample.id}"')
        return content, prompt_blob(place.caption, prompt, self._text_len, self._recipe_key)


def _copy(tensors: SampleTensors) -> SampleTensors:
    """A sample whose features may be changed in place, as those of dropped captions are."""
    features = {name: value.clone() for name, value in tensors["features"].items()}
    return {"latents": tensors["latents"], "prompt": tensors["prompt"], "features": features}
