"""A rater that dies: `python tests/feedback_writer.py STORE RATER VOTES LOG` votes until LOG holds that many answers.

LOG gets a line before each vote ("try") and one after it ("ack", with the vote's id), so a restarted writer knows what its
predecessor had asked for and sends it again with the same nonce, as the page does after a lost connection.
"""

import os
import sys
from pathlib import Path

from rlhf.feedback.store import FeedbackStore


def main() -> None:
    path, rater, votes, log = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    store = FeedbackStore(path)
    lines = log.read_text().splitlines() if log.exists() else []
    done, pending = sum(line.startswith("ack") for line in lines), None
    if lines and lines[-1].startswith("try"):
        pending = int(lines[-1].split()[2])
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while done < votes:
        nonce = f"{rater}/{done:06}"
        if pending is None:
            pending = store.next_comparison(rater).id
            os.write(file, f"try {nonce} {pending}\n".encode())
        choice = ("left", "right", "tie")[pending % 3]
        vote = store.vote(pending, rater, choice, seconds=1.0, nonce=nonce)
        os.write(file, f"ack {nonce} {pending} {vote}\n".encode())
        done, pending = done + 1, None
        print(done, flush=True)


if __name__ == "__main__":
    main()
