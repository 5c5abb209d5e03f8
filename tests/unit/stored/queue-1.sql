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
INSERT INTO "groups" VALUES(2,'a','leased','leased',0,2,4,2,1.79592890087700581555e+09,'ededcde0241d467ba48b300da312b984',X'3F8C39B7BA5A0AA62B2042A229CF02A6',0);
INSERT INTO "groups" VALUES(3,'a','finished','finished',0,2,4,2,1.79592890087725806235e+09,NULL,X'7EC3B313D2E7FDE7C6286DBE7AEC2507',0);
INSERT INTO "groups" VALUES(4,'a','failed','failed',0,2,NULL,NULL,1.79592890087738561635e+09,NULL,X'E4126FBD2D28733887875F9A8B1D74D5',0);
INSERT INTO "groups" VALUES(5,'a','waiting','waiting',0,2,NULL,NULL,NULL,NULL,X'BDAEE06B8FFB199B7BA307FAA8F1F226',0);
CREATE TABLE leases (id TEXT PRIMARY KEY, seconds REAL NOT NULL, deadline REAL NOT NULL);
INSERT INTO "leases" VALUES('ededcde0241d467ba48b300da312b984',300.0,1795929200.87704);
CREATE TABLE log (
  seq INTEGER PRIMARY KEY, time REAL, event TEXT, run TEXT, id TEXT, lease TEXT, version INTEGER);
INSERT INTO "log" VALUES(1,1.79592890087629604338e+09,'accepted','a','acknowledged',NULL,0);
INSERT INTO "log" VALUES(2,1.79592890087647342684e+09,'finished','a','acknowledged',NULL,4);
INSERT INTO "log" VALUES(3,1.79592890087668180468e+09,'leased','a','acknowledged','b5536f237bc740f387b97e99766b9a66',4);
INSERT INTO "log" VALUES(4,1.79592890087678217891e+09,'acknowledged','a','acknowledged','b5536f237bc740f387b97e99766b9a66',0);
INSERT INTO "log" VALUES(5,1.79592890087692260737e+09,'accepted','a','leased',NULL,0);
INSERT INTO "log" VALUES(6,1.79592890087701725961e+09,'finished','a','leased',NULL,4);
INSERT INTO "log" VALUES(7,1.79592890087708687779e+09,'leased','a','leased','ededcde0241d467ba48b300da312b984',4);
INSERT INTO "log" VALUES(8,1.79592890087718820568e+09,'accepted','a','finished',NULL,0);
INSERT INTO "log" VALUES(9,1.79592890087726879118e+09,'finished','a','finished',NULL,4);
INSERT INTO "log" VALUES(10,1.7959289008773527145e+09,'accepted','a','failed',NULL,0);
INSERT INTO "log" VALUES(11,1.79592890087743592255e+09,'failed','a','failed',NULL,0);
INSERT INTO "log" VALUES(12,1.79592890087752270699e+09,'accepted','a','waiting',NULL,0);
CREATE TABLE requests (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
INSERT INTO "requests" VALUES(2,'{"id":"leased","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"routed_experts":false,"metadata":{"index":1}}');
INSERT INTO "requests" VALUES(3,'{"id":"finished","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"routed_experts":false,"metadata":{"index":1}}');
INSERT INTO "requests" VALUES(5,'{"id":"waiting","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"routed_experts":false,"metadata":{"index":1}}');
CREATE TABLE results (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
INSERT INTO "results" VALUES(2,'{"id":"leased","prompt_token_ids":[1,2],"completions":[{"index":0,"text":"ab","token_ids":[3,4],"logprobs":[-0.5,-1.5],"weight_versions":[{"version":4,"start":0,"end":2}],"finish_reason":"stop","stop_reason":".","speculation":{"drafter":"mtp","drafter_version":1,"draft_steps":1,"drafted":2,"accepted":1,"accepted_histogram":[0,1,0],"steps":[[2,1]]},"routed_experts":{"shape":[3,2,1],"dtype":"uint8","data":"AAECAwQF"}}],"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"engine":0,"metadata":{"index":1}}');
INSERT INTO "results" VALUES(3,'{"id":"finished","prompt_token_ids":[1,2],"completions":[{"index":0,"text":"ab","token_ids":[3,4],"logprobs":[-0.5,-1.5],"weight_versions":[{"version":4,"start":0,"end":2}],"finish_reason":"stop","stop_reason":".","speculation":{"drafter":"mtp","drafter_version":1,"draft_steps":1,"drafted":2,"accepted":1,"accepted_histogram":[0,1,0],"steps":[[2,1]]},"routed_experts":{"shape":[3,2,1],"dtype":"uint8","data":"AAECAwQF"}}],"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"engine":0,"metadata":{"index":1}}');
INSERT INTO "results" VALUES(4,'{"id":"failed","error":"too long","metadata":{"index":1}}');
CREATE INDEX by_state ON groups (state, priority DESC, arrival);
CREATE INDEX by_lease ON groups (lease) WHERE lease IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('groups',5);
COMMIT;
PRAGMA user_version = 1;
