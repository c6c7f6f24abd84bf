"""What the tables cannot say by themselves; shown at the top of the page."""

from __future__ import annotations

LIMITS = (
    "Attacks are gradient attacks of moderate strength; none of these numbers is a certificate. "
    "Rates were tuned by short runs (see each section), which favours rates that learn fast. "
    "PGD, transfer and the independent suite used the first few hundred test images, the same for "
    "every method. The boundary attack was cut off long before it converges: its distances are "
    "upper bounds. Times were measured on a busy machine and compare methods only roughly. "
    "Where a table has fewer than three seeds, nothing is called better or worse."
)
