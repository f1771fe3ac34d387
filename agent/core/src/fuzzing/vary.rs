//! Deterministic variations of fuzzing seeds for ordinary tests. Tests of other crates include this
//! file by its path, because a feature of this crate would compile it twice.

/// Runs a target over `count` inputs, each made from one of the seeds by up to five random changes.
/// The inputs are the same in every run.
pub(super) fn vary(seeds: &[Vec<u8>], count: usize, run: impl Fn(&[u8])) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut number = move |below: usize| {
        // xorshift64* (Vigna 2016)
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below.max(1)
    };
    for round in 0..count {
        let Some(seed) = seeds.get(round % seeds.len().max(1)) else { return };
        let mut input = seed.clone();
        for _ in 0..number(6) {
            let at = number(input.len());
            match number(6) {
                0 => input.truncate(at),
                1 => input.insert(at, number(256) as u8),
                2 => {
                    let other = &seeds[number(seeds.len())];
                    input.extend(&other[number(other.len())..]);
                }
                3 if !input.is_empty() => input[at] = [0, 1, 0x7f, 0x80, 0xff][number(5)],
                _ if !input.is_empty() => input[at] ^= 1 << number(8),
                _ => {}
            }
        }
        run(&input);
    }
}
