"""What callers pass and get back: what is static, what changes, what comes out.

In the order of reading: `config` (`Config`), `given` (another kind in its place), `results`
(`StepResult`), `hyper`, `schedule` (`Schedule`), `other_names` (hints for arguments that other
optimizers call otherwise). It must not know of plans or of anything above.
"""

import torch

from .config import COMPUTE_DTYPES as COMPUTE_DTYPES
from .config import FIXED_STEPS as FIXED_STEPS
from .config import CheckedCoefficients as CheckedCoefficients
from .config import Coefficients as Coefficients
from .config import CoefficientsName as CoefficientsName
from .config import Config as Config
from .config import DecayForm as DecayForm
from .config import EpsForm as EpsForm
from .config import Grads as Grads
from .config import Guard as Guard
from .config import GuardScope as GuardScope
from .config import Master as Master
from .config import Method as Method
from .config import MissingGrads as MissingGrads
from .config import MomentumForm as MomentumForm
from .config import Orthogonalizer as Orthogonalizer
from .config import Other as Other
from .config import Precondition as Precondition
from .config import Reduction as Reduction
from .config import Row as Row
from .config import Scale as Scale
from .config import Tensors as Tensors
from .config import check_coefficients as check_coefficients
from .given import config_given as config_given
from .hyper import LARGEST as LARGEST
from .hyper import ONE as ONE
from .hyper import Hyper as Hyper
from .hyper import check_number as check_number
from .presets import Preset as Preset
from .results import MeasuredResult as MeasuredResult
from .results import StepResult as StepResult
from .results import result_of as result_of
from .schedule import Schedule as Schedule

# What torch.save writes of them, torch.load(weights_only=True) reads.
torch.serialization.add_safe_globals([Hyper, StepResult, MeasuredResult])
