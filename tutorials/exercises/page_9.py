"""Page 9, a published model: part A is checked by
`python -m pytest tutorials/exercises -k page_9a`, part B by `page_9b`.
"""


def selectivity(harmful, harmless):
    """Harmful requests refused minus harmless ones refused, in points: a float.

    harmful, harmless: (requests, languages) of True where the reply is a refusal; lists or arrays, each with its own
    number of requests.
    """
    raise NotImplementedError


def auc(harmful, harmless):
    """Share of the pairs of a harmful and a harmless prompt in which the harmful one scores higher, ties half: a float.

    harmful, harmless: scores, one a prompt. B: they may be infinite.
    """
    raise NotImplementedError


def threshold(harmful, harmless):
    """Halfway between the mean score of a few labelled harmful prompts and that of a few harmless ones: a float."""
    raise NotImplementedError


def interval(first, second, draws=4000, seed=0):
    """(difference, low, high), floats, in points: selectivity of the first model minus that of the second, and its 95 %
    interval, the 2.5 % and 97.5 % quantiles of `draws` resamplings of requests. The same seed gives the same interval.

    first, second: each a pair (harmful, harmless) as in `selectivity`, the same requests in the same order. A request
    is drawn with all its languages and in both models at once; harmful and harmless requests are drawn apart.

    B, for all four: ValueError for NaN ("NaN"), for a table without a request, and for two tables that do not have the
    shapes they should.
    """
    raise NotImplementedError
