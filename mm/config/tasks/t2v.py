"""Text to video: a caption and nothing else. Its models also make videos anew from given ones."""

from mm.config.tasks.task import Task

T2V = Task(name="t2v", title="T2V", with_video="v2v")
