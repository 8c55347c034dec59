//! A build that has none: it says so.

use std::net::SocketAddr;
use std::sync::Arc;

use vmferry_datapath::{GuestRam, Link};

use super::PinWish;
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
    pub fn into_link(self, _direct: Option<&Direct>) -> Box<dyn Link> {
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

/// Agreed on with nobody.
pub struct Direct;

impl Direct {
    /// Nothing.
    #[must_use]
    pub fn source(_ram: Arc<GuestRam>) -> Self {
        Self
    }

    /// Nothing.
    #[must_use]
    pub fn target(_ram: Arc<GuestRam>, _pins: &Pins, _lanes: u16) -> Self {
        Self
    }
}

/// Refuses.
pub fn check_memlock(_lanes: u16) -> Result<(), Failure> {
    Err(missing())
}

/// Nothing is pinned.
pub struct Pins {
    /// Lanes that may come.
    pub lanes_max: u16,
}

/// Refuses.
pub fn pins_of_target(
    _lanes_max: u16,
    _direct: Option<(u64, PinWish)>,
    _address: SocketAddr,
) -> Result<Pins, Failure> {
    Err(missing())
}

fn missing() -> Failure {
    Failure::Refused(
        "this vmferry was built without RDMA: build it with the feature rdma, or use tcp://".into(),
    )
}
