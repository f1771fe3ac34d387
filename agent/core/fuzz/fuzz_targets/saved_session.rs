#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_core::fuzzing::tunnel::saved_session(data));
