"""The tables of a store, and the queries that say which votes and ratings count."""

from __future__ import annotations

FORMAT = 1  # PRAGMA user_version
CHOICES = ("left", "right", "tie", "both_bad", "skip")
KINDS = ("human", "model", "rule", "import")

SCHEMA = """
CREATE TABLE setting(name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE model(
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, checkpoint TEXT NOT NULL, sha256 TEXT NOT NULL, created REAL NOT NULL,
  UNIQUE(name, checkpoint, sha256));
CREATE TABLE prompt(  -- content: a JSON string (plain text) or a list of {"role", "content"}
  id INTEGER PRIMARY KEY, content TEXT UNIQUE NOT NULL CHECK(json_valid(content)), source TEXT, created REAL NOT NULL);
CREATE TABLE completion(
  id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL REFERENCES prompt(id),
  model_id INTEGER NOT NULL REFERENCES model(id), text TEXT NOT NULL,
  sampling TEXT CHECK(sampling IS NULL OR json_valid(sampling)), created REAL NOT NULL,
  UNIQUE(prompt_id, model_id, text));
CREATE TABLE rater(
  id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, kind TEXT NOT NULL CHECK(kind IN ('human', 'model', 'rule', 'import')),
  created REAL NOT NULL);
CREATE TABLE pair(  -- two completions of one prompt, to be judged by so many raters; high priority first
  id INTEGER PRIMARY KEY, a_id INTEGER NOT NULL REFERENCES completion(id),
  b_id INTEGER NOT NULL REFERENCES completion(id), raters INTEGER NOT NULL CHECK(raters > 0), priority REAL NOT NULL,
  created REAL NOT NULL, UNIQUE(a_id, b_id), CHECK(a_id < b_id));
CREATE INDEX pair_order ON pair(priority DESC, id);
CREATE TABLE comparison(  -- a pair as it was put before one rater; repeat_of: the same pair, swapped, to the same rater
  id INTEGER PRIMARY KEY, pair_id INTEGER NOT NULL REFERENCES pair(id), rater_id INTEGER NOT NULL REFERENCES rater(id),
  left_id INTEGER NOT NULL REFERENCES completion(id), right_id INTEGER NOT NULL REFERENCES completion(id),
  repeat_of INTEGER UNIQUE REFERENCES comparison(id), created REAL NOT NULL, CHECK(left_id <> right_id));
CREATE UNIQUE INDEX comparison_first ON comparison(pair_id, rater_id) WHERE repeat_of IS NULL;
CREATE INDEX comparison_rater ON comparison(rater_id, id);
CREATE INDEX comparison_pair ON comparison(pair_id, rater_id);
CREATE TABLE vote(  -- a chain per comparison: the first has supersedes NULL, each later row supersedes the one before it
  id INTEGER PRIMARY KEY, comparison_id INTEGER NOT NULL REFERENCES comparison(id),
  choice TEXT NOT NULL CHECK(choice IN ('left', 'right', 'tie', 'both_bad', 'skip', 'undone')),
  strength INTEGER CHECK(strength BETWEEN 1 AND 3), seconds REAL CHECK(seconds >= 0), nonce TEXT UNIQUE,
  supersedes INTEGER UNIQUE REFERENCES vote(id), created REAL NOT NULL,
  CHECK(strength IS NULL OR choice IN ('left', 'right')), CHECK(choice = 'undone' OR nonce IS NOT NULL));
CREATE UNIQUE INDEX vote_first ON vote(comparison_id) WHERE supersedes IS NULL;
CREATE INDEX vote_comparison ON vote(comparison_id, id);
CREATE TABLE rating(
  id INTEGER PRIMARY KEY, completion_id INTEGER NOT NULL REFERENCES completion(id),
  rater_id INTEGER NOT NULL REFERENCES rater(id), score REAL NOT NULL, low REAL NOT NULL, high REAL NOT NULL,
  nonce TEXT UNIQUE NOT NULL, created REAL NOT NULL, CHECK(low < high AND score BETWEEN low AND high));
CREATE VIEW standing AS  -- the votes that count: not superseded, not undone
  SELECT v.id, v.comparison_id, c.pair_id, c.rater_id, c.left_id, c.right_id, c.repeat_of, v.choice, v.strength,
         v.seconds, v.created
  FROM vote v JOIN comparison c ON c.id = v.comparison_id
  WHERE v.choice <> 'undone' AND NOT EXISTS (SELECT 1 FROM vote w WHERE w.supersedes = v.id);
"""


TABLES = ("setting", "model", "prompt", "completion", "rater", "pair", "comparison", "vote", "rating")


SCHEMA += "".join(
    f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'the store is append-only: no {verb} of {table}'); END;\n"
    for table in TABLES
    for verb in ("UPDATE", "DELETE")
)


# of comparison c, the newest row of its chain: "undone" is also where there is none yet
LAST = "coalesce((SELECT v.choice FROM vote v WHERE v.comparison_id = c.id ORDER BY v.id DESC LIMIT 1), 'undone')"
# the pairs that rater ?1 has not seen and that still need raters; what lies before another one since ?2 is his
NEW = (
    "FROM pair p WHERE NOT EXISTS (SELECT 1 FROM comparison c WHERE c.pair_id = p.id AND c.rater_id = ?1) AND raters > "
    "(SELECT count(*) FROM comparison c WHERE c.pair_id = p.id AND +c.repeat_of IS NULL AND "
    f"CASE {LAST} WHEN 'undone' THEN c.created > ?2 ELSE {LAST} <> 'skip' END)"
)


VOTES = """
SELECT s.id AS vote, s.pair_id AS pair, p.content AS prompt, l.text AS left, r.text AS right, ml.name AS left_model,
       mr.name AS right_model, t.name AS rater, t.kind, s.choice, s.strength, s.seconds, s.repeat_of IS NOT NULL AS repeat,
       s.left_id = q.a_id AS a_left, s.created
FROM standing s JOIN pair q ON q.id = s.pair_id JOIN rater t ON t.id = s.rater_id
JOIN completion l ON l.id = s.left_id JOIN completion r ON r.id = s.right_id
JOIN model ml ON ml.id = l.model_id JOIN model mr ON mr.id = r.model_id JOIN prompt p ON p.id = l.prompt_id ORDER BY s.id
"""


RATINGS = """
SELECT p.content AS prompt, c.text AS response, g.score, g.low, g.high, t.name AS rater, t.kind, m.name AS model
FROM rating g JOIN completion c ON c.id = g.completion_id JOIN prompt p ON p.id = c.prompt_id
JOIN rater t ON t.id = g.rater_id JOIN model m ON m.id = c.model_id ORDER BY g.id
"""
