"""The names of `meshgpt.__init__`, which imports them when they are used, for type checkers."""

from meshgpt.api import LanguageModel as LanguageModel
from meshgpt.api import TrainedRun as TrainedRun
from meshgpt.api import load as load
from meshgpt.api import prepare as prepare
from meshgpt.api import train as train
from meshgpt.checkpoint.manager import Checkpointing as Checkpointing
from meshgpt.config import Data as Data
from meshgpt.config import Evals as Evals
from meshgpt.config import Run as Run
from meshgpt.config import Samples as Samples
from meshgpt.distributed.mesh import MeshShape as MeshShape
from meshgpt.errors import MachineError as MachineError
from meshgpt.errors import UserError as UserError
from meshgpt.models.model import GPT2Config as GPT2Config
from meshgpt.models.model import GPTJConfig as GPTJConfig
from meshgpt.optim.config import AdamW as AdamW
from meshgpt.training.callbacks import Callback as Callback

__version__: str
