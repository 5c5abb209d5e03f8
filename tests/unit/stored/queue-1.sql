BEGIN TRANSACTION;
CREATE TABLE acknowledged (
  seq INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, digest BLOB);
INSERT INTO "acknowledged" VALUES(1,X'F54FF4229C2F8E6D0E387908DE903778',X'DD3893274435130488E6A77C36040F07');
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO "counts" VALUES('dropped',0);
INSERT INTO "counts" VALUES('wasted_tokens',0);
INSERT INTO "counts" VALUES('acknowledged',1);
CREATE TABLE groups (
  arrival INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL,
  priority INTEGER NOT NULL, max_staleness INTEGER, oldest INTEGER, tokens INTEGER, finished REAL, lease TEXT,
  digest BLOB, rounds INTEGER NOT NULL DEFAULT 0,
  UNIQUE (run, id));
INSERT INTO "groups" VALUES(2,'a','leased','leased',0,2,4,2,1.79592956737273693086e+09,'a0ea40f394e64518820424c1e41103b7',X'CE3C7AE7038697268F5A0BABB6560C18',0);
INSERT INTO "groups" VALUES(3,'a','finished','finished',0,2,4,2,1.79592956737298917765e+09,NULL,X'E8D966BE91040D711C26640CF9D4B1CF',0);
INSERT INTO "groups" VALUES(4,'a','failed','failed',0,2,NULL,NULL,1795929567.37312,NULL,X'681D254D3872A1FD61A40D221DA39FCC',0);
INSERT INTO "groups" VALUES(5,'a','waiting','waiting',0,2,NULL,NULL,NULL,NULL,X'96628D3A107ECB4CA4762EE85960B93D',0);
CREATE TABLE leases (id TEXT PRIMARY KEY, seconds REAL NOT NULL, deadline REAL NOT NULL);
INSERT INTO "leases" VALUES('a0ea40f394e64518820424c1e41103b7',300.0,1.79592986737277102472e+09);
CREATE TABLE log (
  seq INTEGER PRIMARY KEY, time REAL, event TEXT, run TEXT, id TEXT, lease TEXT, version INTEGER);
INSERT INTO "log" VALUES(1,1.795929567372027874e+09,'accepted','a','acknowledged',NULL,0);
INSERT INTO "log" VALUES(2,1.79592956737220406536e+09,'finished','a','acknowledged',NULL,4);
INSERT INTO "log" VALUES(3,1.79592956737241697317e+09,'leased','a','acknowledged','77f2d04b0b9c4b94a6ef5e3dda0bebc0',4);
INSERT INTO "log" VALUES(4,1.79592956737251472471e+09,'acknowledged','a','acknowledged','77f2d04b0b9c4b94a6ef5e3dda0bebc0',0);
INSERT INTO "log" VALUES(5,1.79592956737265586853e+09,'accepted','a','leased',NULL,0);
INSERT INTO "log" VALUES(6,1.79592956737274837492e+09,'finished','a','leased',NULL,4);
INSERT INTO "log" VALUES(7,1.79592956737281584742e+09,'leased','a','leased','a0ea40f394e64518820424c1e41103b7',4);
INSERT INTO "log" VALUES(8,1.7959295673729176521e+09,'accepted','a','finished',NULL,0);
INSERT INTO "log" VALUES(9,1.79592956737300062184e+09,'finished','a','finished',NULL,4);
INSERT INTO "log" VALUES(10,1.79592956737308502199e+09,'accepted','a','failed',NULL,0);
INSERT INTO "log" VALUES(11,1.79592956737317061425e+09,'failed','a','failed',NULL,0);
INSERT INTO "log" VALUES(12,1.79592956737333941464e+09,'accepted','a','waiting',NULL,0);
CREATE TABLE requests (arrival INTEGER PRIMARY KEY, body TEXT NOT NULL);
INSERT INTO "requests" VALUES(2,'{"id":"leased","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"routed_experts":true,"metadata":{"index":1}}');
INSERT INTO "requests" VALUES(3,'{"id":"finished","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"routed_experts":true,"metadata":{"index":1}}');
INSERT INTO "requests" VALUES(5,'{"id":"waiting","prompt_token_ids":[1,2],"n":2,"sampling":{"temperature":0.5,"top_p":0.9,"top_k":5,"max_tokens":7,"min_tokens":1,"stop":["."],"ignore_eos":true,"seed":3},"session":"s","draft_steps":true,"routed_experts":true,"metadata":{"index":1}}');
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
