//! A build that has none: it says so.

use std::net::SocketAddr;

use vmferry_datapath::Link;

use crate::failure::Failure;

/// There are none in this build.
pub enum Lane {}

impl Lane {
    /// Refuses.
    pub fn dial(_address: SocketAddr, _hello: &[u8]) -> Result<Self, Failure> {
        Err(missing())
    }

    /// There is none to make a link of.
    #[must_use]
    pub fn into_link(self) -> Box<dyn Link> {
        match self {}
    }
}

/// There is none in this build.
pub enum Listener {}

impl Listener {
    /// Refuses.
    pub fn bind(_address: SocketAddr) -> Result<Self, Failure> {
        Err(missing())
    }

    /// There is none that could be asked.
    pub fn next<T>(
        &self,
        _parse: impl Fn(&[u8]) -> Option<T>,
        _turned_away: impl Fn(&str),
    ) -> Option<(T, Lane)> {
        match *self {}
    }
}

/// Refuses.
pub fn check_memlock(_lanes: u16, _sending: bool) -> Result<(), Failure> {
    Err(missing())
}

fn missing() -> Failure {
    Failure::Refused(
        "this vmferry was built without RDMA: build it with the feature rdma, or use tcp://".into(),
    )
}
