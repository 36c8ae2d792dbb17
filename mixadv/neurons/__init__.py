"""What the neurons of a model know: activations, probes, and the fewest that suffice."""

from importlib.util import find_spec

try:
    from mixadv.neurons.activations import Activations, activations
    from mixadv.neurons.analyse import analyse_neurons
    from mixadv.neurons.analysis import NeuronAnalysis

    if find_spec("sklearn") is None:  # imported when a probe is fitted: it takes a second
        raise ModuleNotFoundError("No module named 'sklearn'")
except ImportError as error:
    raise ImportError(
        f"mixadv.neurons needs numpy, scipy, scikit-learn and tqdm ({error}): "
        "pip install 'mixadv[robustness]'."
    ) from error

__all__ = ["Activations", "NeuronAnalysis", "activations", "analyse_neurons"]
