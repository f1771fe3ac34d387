#![no_main]

use skein_cni::environment::Environment;

// Input: lines of KEY=VALUE, which become the environment of the plugin.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Environment::read(|name| {
        let value = |line: &str| Some(line.strip_prefix(name)?.strip_prefix('=')?.to_owned());
        text.lines().find_map(value)
    });
});
