//! The value of stolen static keys: which recorded traffic and which traffic of other nodes they
//! decrypt.

use super::*;
use crate::testing::session_params;
use crate::tunnel::message::{CLEAR_LEN, initiation_clear};
use crate::tunnel::noise::{Identity, Initiator, Responder, TransportSecrets};
use crate::tunnel::session::{Cipher, SessionParams};
use zeroize::Zeroizing;

fn identity(key: u8) -> Identity {
    Identity::new(PrivateKey::new(&[key; 32]), b"skein v1test".to_vec()).unwrap()
}

/// A handshake as an observer on the path records it.
struct Recorded {
    clear: [u8; CLEAR_LEN],
    first: Vec<u8>,
    second: Vec<u8>,
}

/// Performs the handshake of nodes 1 and 2 with these ephemeral keys. Returns the recording and the
/// secrets.
fn record_handshake(ephemeral: [u8; 2]) -> (Recorded, TransportSecrets) {
    let (a, b) = (identity(1), identity(2));
    let clear = initiation_clear(7, PORT);
    let (mut first, mut second, mut payload) = (vec![], vec![], [0; 1200]);
    let secret = |key: u8| Zeroizing::new([key; 32]);
    let (to, with) = (b.public(), secret(ephemeral[0]));
    let mut initiator = Initiator::start(&a, to, with, &clear, b"hello", &mut first).unwrap();
    let with = secret(ephemeral[1]);
    let (responder, _) = Responder::read(&b, with, &clear, &first, &mut payload).unwrap();
    let secrets = responder.reply(b"welcome", &mut second).unwrap();
    let (_, same) = initiator.finish(&second, &mut payload).unwrap();
    assert_eq!(secrets, same);
    (Recorded { clear, first, second }, secrets)
}

fn session(secrets: TransportSecrets, initiator: bool, cipher: Cipher) -> Session {
    let params = SessionParams { cipher, secrets, ..session_params(initiator) };
    Session::new(params).unwrap()
}

/// Returns one datagram of each direction.
fn traffic(secrets: &TransportSecrets, cipher: Cipher) -> Vec<Vec<u8>> {
    let seal = |initiator| {
        let mut datagram = vec![0; 4 + OVERHEAD];
        let session = session(secrets.clone(), initiator, cipher);
        session.sender(0).unwrap().seal(Flags::default(), b"past", &mut datagram).unwrap();
        datagram
    };
    vec![seal(true), seal(false)]
}

/// Returns how many of the datagrams open with the secrets, at either end.
fn opened(secrets: &[TransportSecrets], datagrams: &[Vec<u8>], cipher: Cipher) -> usize {
    let tries = secrets.iter().flat_map(|secret| [true, false].map(|end| (secret, end)));
    let opens = |(secret, end): (&TransportSecrets, bool)| {
        let session = session(secret.clone(), end, cipher);
        let opens =
            |datagram: &&Vec<u8>| session.receiver(0).unwrap().open(&mut datagram.to_vec()).is_ok();
        datagrams.iter().filter(opens).count()
    };
    tries.map(opens).sum()
}

/// Returns the secrets that an attacker computes from a recording with the static keys of both
/// nodes and these ephemeral keys.
fn secrets_of(recorded: &Recorded, ephemeral: impl Iterator<Item = u8>) -> Vec<TransportSecrets> {
    let (a, b) = (identity(1), identity(2));
    let Recorded { clear, first, second } = recorded;
    let mut found = vec![];
    for key in ephemeral {
        let secret = || Zeroizing::new([key; 32]);
        let mut payload = [0; 1200];
        // The attacker acts as responder. The static key reveals the initiator's identity, which is
        // no secret.
        let (responder, length) =
            Responder::read(&b, secret(), clear, first, &mut payload).unwrap();
        assert_eq!((&responder.initiator, &payload[..length]), (a.public(), &b"hello"[..]));
        found.push(responder.reply(b"welcome", &mut vec![]).unwrap());
        // The attacker acts as initiator.
        let mut again = vec![];
        let start = Initiator::start(&a, b.public(), secret(), clear, b"hello", &mut again);
        found.extend(start.unwrap().finish(second, &mut payload).map(|(_, secrets)| secrets));
    }
    found
}

#[test]
fn stolen_static_keys_open_no_recorded_traffic() {
    let (recorded, secrets) = record_handshake([100, 200]);
    for cipher in [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305] {
        let past = traffic(&secrets, cipher);
        let secrets = secrets_of(&recorded, 1..96);
        assert!(secrets.len() > 50, "The attacker must be able to act as responder.");
        assert_eq!(opened(&secrets, &past, cipher), 0);
        // Only the ephemeral keys, which are wiped after the handshake, are missing: each of them
        // suffices.
        for lost in [100, 200] {
            let secrets = secrets_of(&recorded, [lost].into_iter());
            assert_eq!(
                opened(&secrets, &past, cipher),
                2,
                "The test must detect a secret that opens the traffic."
            );
        }
    }
}

#[test]
fn stolen_key_of_one_node_opens_no_traffic_of_others() {
    let mut lab = Lab::new(3);
    for (from, to) in [(0, 1), (0, 2), (1, 2)] {
        lab.send(from, to, b"first");
        lab.run(ms(20));
        assert!(lab.joined(from, to));
    }
    let start = lab.trace.len();
    lab.send(1, 2, b"between two");
    lab.send(2, 1, b"others");
    let overheard: Vec<_> = lab.trace[start..].to_vec();
    assert_eq!(overheard.len(), 2);
    let thief = &lab.nodes[0].engine;
    let sessions: Vec<_> = thief.tables().flat_map(|(_, view)| view.receive.clone()).collect();
    assert!(sessions.len() >= 2);
    for datagram in overheard {
        for session in &sessions {
            for lane in 0..session.remote_lanes {
                // The header names each session in turn.
                let mut payload = datagram.payload.clone();
                assert!(session.receiver(lane).unwrap().open(&mut payload).is_err());
            }
        }
    }
}
