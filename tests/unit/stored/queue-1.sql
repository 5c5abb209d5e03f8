BEGIN TRANSACTION;
CREATE TABLE acknowledged (
  seq INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, digest BLOB);
INSERT INTO "acknowledged" VALUES(1,X'F54FF4229C2F8E6D0E387908DE903778',X'0DCC0AB11B04E6468B54C8877C01D37B');
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO "counts" VALUES('dropped',0);
INSERT INTO "counts" VALUES('wasted_tokens',0);
INSERT INTO "counts" VALUES('acknowledged',1);
CREATE TABLE groups (
  arrival INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL, max_staleness INTEGER, oldest INTEGER, tokens INTEGER, finished REAL, lease TEXT,
  digest BLOB, rounds INTEGER NOT NULL DEFAULT 0,
  UNIQUE (run, id));
INSERT INTO "groups" VALUES(2,'a','leased','leased',0,2,4,2,1.79590950219090843198e+09,'409d93cea05349c9bfa8d89e32ae194d',X'3F8C39B7BA5A0AA62B2042A229CF02A6',0);
INSERT INTO "groups" VALUES(3,'a','finished','finished',0,2,4,2,1.79590950223068547249e+09,NULL,X'7EC3B313D2E7FDE7C6286DBE7AEC2507',0);
INSERT INTO "groups" VALUES(4,'a','failed','failed',0,2,NULL,NULL,1.79590950223096442218e+09,NULL,X'E4126FBD2D28733887875F9A8B1D74D5',0);
INSERT INTO "groups" VALUES(5,'a','waiting','waiting',0,2,NULL,NULL,NULL,NULL,X'BDAEE06B8FFB199B7BA307FAA8F1F226',0);
CREATE TABLE leases (id TEXT PRIMARY KEY, seconds REAL NOT NULL, deadline REAL NOT NULL);
INSERT INTO "leases" VALUES('409d93cea05349c9bfa8d89e32ae194d',300.0,1.79590980219095134738e+09);
CREATE TABLE log (
  seq INTEGER PRIMARY KEY, time REAL, event TEXT, run TEXT, id TEXT, lease TEXT, version INTEGER);
INSERT INTO "log" VALUES(1,1.79590950218999314312e+09,'accepted','a','acknowledged',NULL,0);
INSERT INTO "log" VALUES(2,1.79590950219025015832e+09,'finished','a','acknowledged',NULL,4);
INSERT INTO "log" VALUES(3,1.79590950219049859046e+09,'leased','a','acknowledged','04c5e4dd4c324b94b5ec8bdb07368d91',4);
INSERT INTO "log" VALUES(4,1.79590950219062137601e+09,'acknowledged','a','acknowledged','04c5e4dd4c324b94b5ec8bdb07368d91',0);
INSERT INTO "log" VALUES(5,1.79590950219078779219e+09,'accepted','a','leased',NULL,0);
INSERT INTO "log" VALUES(6,1.79590950219092345243e+09,'finished','a','leased',NULL,4);
INSERT INTO "log" VALUES(7,1.79590950223008155822e+09,'leased','a','leased','409d93cea05349c9bfa8d89e32ae194d',4);
INSERT INTO "log" VALUES(8,1.79590950223050546639e+09,'accepted','a','finished',NULL,0);
INSERT INTO "log" VALUES(9,1.79590950223071837421e+09,'finished','a','finished',NULL,4);
INSERT INTO "log" VALUES(10,1.7959095022308909893e+09,'accepted','a','failed',NULL,0);
INSERT INTO "log" VALUES(11,1.79590950223116254799e+09,'failed','a','failed',NULL,0);
INSERT INTO "log" VALUES(12,1.79590950223132348058e+09,'accepted','a','waiting',NULL,0);
CREATE TABLE requests (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
INSERT INTO "requests" VALUES(2,'{"id":"leased","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"metadata":{"index":1}}');
INSERT INTO "requests" VALUES(3,'{"id":"finished","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"metadata":{"index":1}}');
INSERT INTO "requests" VALUES(5,'{"id":"waiting","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"metadata":{"index":1}}');
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
