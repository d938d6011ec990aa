"""Model folders and caches, opened as the stages take them."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import StudentError, TeacherError
from kdpipe.stages.feed.dataset import Teacher, of_caches
from kdpipe.stages.models.folder import ModelFolder


def student_in(folder: Path, trust: str | None = None) -> ModelFolder:
    return ModelFolder(folder, StudentError, trust)


def load_student(folder: Path, dtype: torch.dtype, device: torch.device, trust: str | None = None) -> PreTrainedModel:
    return student_in(folder, trust).load(dtype, device)


def teacher_in(folder: Path, trust: str | None = None) -> ModelFolder:
    return ModelFolder(folder, TeacherError, trust)


def teacher_of(cache: Cache) -> Teacher:
    (teacher,) = of_caches([cache]).teachers
    return teacher
