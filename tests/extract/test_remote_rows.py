"""An extraction of rows that name objects of a bucket."""

import json
from pathlib import Path

import torch
from extraction_runs import opened, words
from feature_samples import write_clip
from object_storage import S3

from mm.config.rules.extraction import check_extraction
from mm.config.run.shapes import FrameRule
from mm.config.storage import Storage
from mm.dialects.mindspeed.extraction import read_extraction
from mm.extract.run import ExtractReport, extract


def test_objects_are_encoded_and_those_that_changed_again(s3: S3, files: dict[str, Path], tmp_path: Path) -> None:
    """Beside local files; the features are those of the same file on the disk."""
    address = s3.publish(tmp_path / "set", "public-rows")
    rows = [{"path": f"{address}/videos/1.mp4", "cap": "x"}, {"path": "videos/1.mp4", "cap": "x"}]
    (tmp_path / "set" / "data.json").write_text(json.dumps(rows))
    how = Storage(cache=str(tmp_path / "cache"), endpoint_url=s3.endpoint, anonymous=True)

    def run() -> ExtractReport:
        described = read_extraction(words(files))
        clip = described.data.clip.model_copy(update={"frames": FrameRule(start="first")})
        data = described.data.model_copy(update={"storage": how, "clip": clip})
        described = described.model_copy(update={"data": data})
        check_extraction(described)
        return extract(described, device=torch.device("cpu"))

    assert run() == ExtractReport(listed=2, encoded=2, reused=0)
    data = opened(tmp_path / "store", tmp_path)
    assert [data.name(0), data.name(1)] == [address.replace("//", "/") + "/videos/1.mp4", "videos/1.mp4"]
    assert torch.equal(data[0]["latents"], data[1]["latents"])
    assert run() == ExtractReport(listed=2, encoded=0, reused=2)
    write_clip(tmp_path / "other.mp4", 14)
    other = (tmp_path / "other.mp4").read_bytes() + b"more"
    s3.client.put_object(Bucket="public-rows", Key="set/videos/1.mp4", Body=other, ACL="public-read")
    assert run() == ExtractReport(listed=2, encoded=1, reused=1)
