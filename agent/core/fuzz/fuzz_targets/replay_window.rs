#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_core::fuzzing::tunnel::replay_window(data));
