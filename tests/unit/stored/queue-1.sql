BEGIN TRANSACTION;
CREATE TABLE acknowledged (
  seq INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, digest BLOB);
INSERT INTO "acknowledged" VALUES(1,X'F54FF4229C2F8E6D0E387908DE903778',X'5D18B5FFF1F1EAAAB98D3080221D1C49');
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO "counts" VALUES('dropped',0);
INSERT INTO "counts" VALUES('wasted_tokens',0);
INSERT INTO "counts" VALUES('acknowledged',1);
CREATE TABLE groups (
  arrival INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL, max_staleness INTEGER, oldest INTEGER, tokens INTEGER, finished REAL, lease TEXT,
  digest BLOB, rounds INTEGER NOT NULL DEFAULT 0,
  UNIQUE (run, id));
INSERT INTO "groups" VALUES(2,'a','leased','leased',0,2,4,2,1.79585913038497591021e+09,'e7c3413ae46845a4899a6c2c88c1e4d0',X'E15D01F4232CA84FC9BE7F2232648049',0);
INSERT INTO "groups" VALUES(3,'a','finished','finished',0,2,4,2,1.79585913038551688199e+09,NULL,X'43D5DF0D0BFD8D2CC9C99A0BC8D80A41',0);
INSERT INTO "groups" VALUES(4,'a','failed','failed',0,2,NULL,NULL,1.79585913038571500779e+09,NULL,X'3CD11C9865C8C59B456E290E32EE11C7',0);
INSERT INTO "groups" VALUES(5,'a','waiting','waiting',0,2,NULL,NULL,NULL,NULL,X'EC87D0B13C683EB96A2FA75E7D957560',0);
CREATE TABLE leases (id TEXT PRIMARY KEY, seconds REAL NOT NULL, deadline REAL NOT NULL);
INSERT INTO "leases" VALUES('e7c3413ae46845a4899a6c2c88c1e4d0',300.0,1.79585943038504195217e+09);
CREATE TABLE log (
  seq INTEGER PRIMARY KEY, time REAL, event TEXT, run TEXT, id TEXT, lease TEXT, version INTEGER);
INSERT INTO "log" VALUES(1,1.79585913038370156282e+09,'accepted','a','acknowledged',NULL,0);
INSERT INTO "log" VALUES(2,1.79585913038416767123e+09,'finished','a','acknowledged',NULL,4);
INSERT INTO "log" VALUES(3,1.79585913038447451592e+09,'leased','a','acknowledged','1b676d8253784633a8c65ec0ccc96575',4);
INSERT INTO "log" VALUES(4,1.7958591303846235275e+09,'acknowledged','a','acknowledged','1b676d8253784633a8c65ec0ccc96575',0);
INSERT INTO "log" VALUES(5,1.7958591303848485946e+09,'accepted','a','leased',NULL,0);
INSERT INTO "log" VALUES(6,1.7958591303850066662e+09,'finished','a','leased',NULL,4);
INSERT INTO "log" VALUES(7,1.79585913038510417935e+09,'leased','a','leased','e7c3413ae46845a4899a6c2c88c1e4d0',4);
INSERT INTO "log" VALUES(8,1.79585913038541245458e+09,'accepted','a','finished',NULL,0);
INSERT INTO "log" VALUES(9,1.79585913038553118704e+09,'finished','a','finished',NULL,4);
INSERT INTO "log" VALUES(10,1.79585913038565635679e+09,'accepted','a','failed',NULL,0);
INSERT INTO "log" VALUES(11,1.79585913038580656051e+09,'failed','a','failed',NULL,0);
INSERT INTO "log" VALUES(12,1.7958591303859512806e+09,'accepted','a','waiting',NULL,0);
CREATE TABLE requests (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
INSERT INTO "requests" VALUES(2,'{"id":"leased","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"draft_steps":true,"metadata":{"index":1}}');
INSERT INTO "requests" VALUES(3,'{"id":"finished","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"draft_steps":true,"metadata":{"index":1}}');
INSERT INTO "requests" VALUES(5,'{"id":"waiting","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"draft_steps":true,"metadata":{"index":1}}');
CREATE TABLE results (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
INSERT INTO "results" VALUES(2,'{"id":"leased","prompt_token_ids":[1,2],"completions":[{"index":0,"text":"ab","token_ids":[3,4],"logprobs":[-0.5,-1.5],"weight_versions":[{"version":4,"start":0,"end":2}],"finish_reason":"stop","stop_reason":".","speculation":{"drafter":"mtp","drafter_version":1,"draft_steps":1,"drafted":2,"accepted":1,"accepted_histogram":[0,1,0],"steps":[[2,1]]}}],"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"engine":0,"metadata":{"index":1}}');
INSERT INTO "results" VALUES(3,'{"id":"finished","prompt_token_ids":[1,2],"completions":[{"index":0,"text":"ab","token_ids":[3,4],"logprobs":[-0.5,-1.5],"weight_versions":[{"version":4,"start":0,"end":2}],"finish_reason":"stop","stop_reason":".","speculation":{"drafter":"mtp","drafter_version":1,"draft_steps":1,"drafted":2,"accepted":1,"accepted_histogram":[0,1,0],"steps":[[2,1]]}}],"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"engine":0,"metadata":{"index":1}}');
INSERT INTO "results" VALUES(4,'{"id":"failed","error":"too long","metadata":{"index":1}}');
CREATE INDEX by_state ON groups (state, priority DESC, arrival);
CREATE INDEX by_lease ON groups (lease) WHERE lease IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('groups',5);
COMMIT;
PRAGMA user_version = 1;
