"""``inlay demo``: the same training steps and the same generation with and without Inlay, compared.

``options`` settles what runs, ``data`` and ``model`` make the text and the model, ``train`` and ``generate`` run and
measure, ``verdict`` decides whether the numbers agree, ``show`` and ``plot`` present, ``run`` is the order of it all.
"""
