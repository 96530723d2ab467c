//! What the fuzzers begin with, and what they have found.

include!("../../../tests/fuzz/seed_tests.rs");

seeds!(agent_replies config_files image_documents);
