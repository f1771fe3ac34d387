#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skein_agent::fuzzing::netlink_messages(data));
