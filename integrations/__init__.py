"""Framework code of hvdx: each file knows one framework; nothing here knows two.

The folder lies at the top of the repository and is installed as ``hvdx.integrations``.
"""

if __name__ != "hvdx.integrations":
    raise ImportError(f"{__name__!r} is hvdx.integrations: import that, after 'pip install -e .'")
