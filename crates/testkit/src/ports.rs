//! Ports for brokers that a test starts.

use std::{
    net::{Ipv4Addr, TcpListener, UdpSocket},
    sync::Mutex,
};

/// What this process has claimed, until it ends.
static CLAIMED: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());

/// A TCP port that is free, and the one after it too. It lies below the ports that the system gives to connections and
/// to listeners on port 0, and no other call gives it, in no process: what is started there may bind it seconds later,
/// and bind it again after a restart.
///
/// # Panics
/// When a thousand ports at random were all in use.
#[must_use]
pub fn free_port() -> u16 {
    let local = Ipv4Addr::LOCALHOST;
    let free = (0..1000).map(|_| fastrand::u16(6000..16_000) * 2).find_map(|port| {
        // Tests of other processes choose too: who has the UDP port has the TCP port, which stays unbound.
        let claim = UdpSocket::bind((local, port)).ok()?;
        let is_free = [port, port + 1].iter().all(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok());
        is_free.then_some((port, claim))
    });
    let (port, claim) = free.expect("a free port below 32000");
    crate::cx::lock(&CLAIMED).push(claim);
    port
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_given_once_and_can_be_bound() {
        let mut given: Vec<u16> = (0..200).map(|_| free_port()).collect();
        for port in &given {
            assert!((12_000..32_000).contains(port) && port % 2 == 0, "{port}");
            for port in [*port, port + 1] {
                TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("it is free");
            }
        }
        given.sort_unstable();
        given.dedup();
        assert_eq!(given.len(), 200);
    }
}
