//! Benchmarks of datagrams and handshakes.

#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use skein_core::route::PeerId;
use skein_core::time::Time;
use skein_core::tunnel::{
    Cipher, Ciphers, Engine, EngineConfig, PeerConfig, ReplayWindow, Session, SessionParams,
    TransportSecrets,
};
use skein_core::wire::header::{Flags, OVERHEAD};

const CIPHERS: [Cipher; 2] = [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305];
const SIZES: [usize; 2] = [64, 1400];

fn main() {
    divan::main();
}

fn session(cipher: Cipher, initiator: bool, lanes: u8) -> Session {
    Session::new(SessionParams {
        peer: PeerId(0),
        local_index: 1,
        remote_index: 1,
        cipher,
        local_lanes: lanes,
        remote_lanes: lanes,
        established: Time::default(),
        initiator,
        epoch: 0,
        ecn: false,
        secrets: TransportSecrets::new([1; 32], [2; 32]),
    })
    .unwrap()
}

#[divan::bench(args = CIPHERS, consts = SIZES)]
fn seal<const SIZE: usize>(bencher: Bencher<'_, '_>, cipher: Cipher) {
    let session = session(cipher, true, 1);
    let sender = session.sender(0).unwrap();
    let (plaintext, mut out) = (vec![7; SIZE], vec![0; SIZE + OVERHEAD]);
    bencher.counter(BytesCount::new(SIZE)).bench_local(|| {
        sender.seal(Flags::default(), black_box(&plaintext), black_box(&mut out)).unwrap()
    });
}

/// Benchmark of opening a datagram and checking the replay window, as a lane does.
#[divan::bench(args = CIPHERS, consts = SIZES)]
fn open<const SIZE: usize>(bencher: Bencher<'_, '_>, cipher: Cipher) {
    let (ours, theirs) = (session(cipher, true, 1), session(cipher, false, 1));
    let (sender, receiver) = (theirs.sender(0).unwrap(), ours.receiver(0).unwrap());
    let mut window = ReplayWindow::new();
    bencher
        .counter(BytesCount::new(SIZE))
        .with_inputs(|| {
            let mut datagram = vec![0; SIZE + OVERHEAD];
            sender.seal(Flags::default(), &[7; SIZE], &mut datagram).unwrap();
            datagram
        })
        .bench_local_refs(|datagram| {
            let (header, plaintext) = receiver.open(datagram).unwrap();
            window.check_and_set(header.counter).unwrap();
            plaintext.len()
        });
}

/// Benchmark of the AEAD alone, out of place. The difference to [`seal`] is the cost of the header
/// and of this crate.
#[divan::bench(args = CIPHERS, consts = SIZES)]
fn bare_seal<const SIZE: usize>(bencher: Bencher<'_, '_>, cipher: Cipher) {
    let key = bare_key(cipher);
    let (plaintext, mut out, mut tag) = (vec![7; SIZE], vec![0; SIZE], [0; 16]);
    let mut number = 0u64;
    bencher.counter(BytesCount::new(SIZE)).bench_local(|| {
        number += 1;
        key.seal_out_of_place_scatter(
            nonce(number),
            Aad::from([0; 16]),
            black_box(&plaintext),
            black_box(&mut out),
            &[],
            &mut tag,
        )
        .unwrap();
    });
}

/// Benchmark of the AEAD alone, in place. The difference to [`open`] is the cost of the header and
/// of this crate.
#[divan::bench(args = CIPHERS, consts = SIZES)]
fn bare_open<const SIZE: usize>(bencher: Bencher<'_, '_>, cipher: Cipher) {
    let key = bare_key(cipher);
    let mut sealed = vec![7; SIZE];
    key.seal_in_place_append_tag(nonce(1), Aad::from([0; 16]), &mut sealed).unwrap();
    bencher.counter(BytesCount::new(SIZE)).with_inputs(|| sealed.clone()).bench_local_refs(
        |sealed| key.open_in_place(nonce(1), Aad::from([0; 16]), sealed).unwrap().len(),
    );
}

fn bare_key(cipher: Cipher) -> LessSafeKey {
    let algorithm = match cipher {
        Cipher::Aes256Gcm => &AES_256_GCM,
        Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
    };
    LessSafeKey::new(UnboundKey::new(algorithm, &[1; 32]).unwrap())
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

#[divan::bench(args = [1, 4, 64])]
fn derive_keys(bencher: Bencher<'_, '_>, lanes: u8) {
    bencher.bench(|| session(Cipher::Aes256Gcm, true, lanes));
}

fn engine(key: u8) -> Engine {
    let mut state = u64::from(key);
    let random = move |out: &mut [u8]| {
        out.fill_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        });
    };
    let config = EngineConfig {
        private_key: skein_core::PrivateKey::new(&[key; 32]),
        cluster_id: "bench".to_owned(),
        listen_port: 51900,
        lanes: 4,
        ciphers: Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: true },
        mtu: 1440,
        ecn: false,
    };
    Engine::new(config, Box::new(random)).unwrap()
}

/// Benchmark of both ends of a handshake, from the first packet to the confirmed session.
#[divan::bench]
fn handshake(bencher: Bencher<'_, '_>) {
    let now = Time { mono: Duration::from_secs(1), wall: Duration::from_secs(1_700_000_000) };
    let addresses = ["192.0.2.1:51900", "192.0.2.2:51900"].map(|a| a.parse().unwrap());
    bencher
        .counter(ItemsCount::new(1u32))
        .with_inputs(|| {
            let (mut a, mut b) = (engine(1), engine(2));
            let peer = |engine: &Engine, at| PeerConfig {
                public_key: engine.public_key(),
                second_key: None,
                endpoints: vec![at],
            };
            let id = a.upsert_peer(now, peer(&b, addresses[1]));
            b.upsert_peer(now, peer(&a, addresses[0]));
            (a, b, id)
        })
        .bench_local_values(|(mut a, mut b, id)| {
            a.request_session(now, id);
            for _ in 0..2 {
                while let Some(mut transmit) = a.poll_transmit() {
                    b.handle_datagram(now, addresses[0], &mut transmit.payload);
                }
                while let Some(mut transmit) = b.poll_transmit() {
                    a.handle_datagram(now, addresses[1], &mut transmit.payload);
                }
            }
            assert!(b.tables().all(|(_, view)| view.current.is_some()));
            (a, b)
        });
}
