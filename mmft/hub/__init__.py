"""Publishing: a finished run -> a repository on the Hub with a model card made from the run, and back (docs/hub.md)."""

from mmft.hub.folder import make_folder
from mmft.hub.remote import PublishError, pull, push

UNPUBLISHED = 3  # exit code after a failure of the Hub

__all__ = ["UNPUBLISHED", "PublishError", "make_folder", "pull", "push"]
