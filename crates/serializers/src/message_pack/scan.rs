//! One pass over the markers of a MessagePack body, before anything is built from it.

use crate::limits::Limits;

/// Why a body is not one whole MessagePack value of permitted depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Flaw {
    #[error("it ends before the lengths it claims")]
    Truncated,
    #[error("it goes on after its value")]
    Trailing,
    #[error("it holds a marker that MessagePack reserves")]
    Reserved,
    #[error("it nests too deep")]
    TooDeep,
}

/// What follows a marker.
enum Next {
    /// This many bytes of data.
    Data(usize),
    /// A list or map of this many values.
    Values(usize),
}

/// Checks that `body` is exactly one value, that each claimed length is backed by bytes, and that at most
/// `max_containers` lists and maps enclose each other.
pub(crate) fn check(body: &[u8], max_containers: usize) -> Result<(), Flaw> {
    let mut open = [0usize; Limits::DEPTH_CEILING];
    let mut depth = 0;
    let mut values = 1;
    let mut rest = body;
    loop {
        while values == 0 {
            if depth == 0 {
                return if rest.is_empty() { Ok(()) } else { Err(Flaw::Trailing) };
            }
            depth -= 1;
            values = open[depth];
        }
        values -= 1;
        match marker(&mut rest)? {
            Next::Data(0) => {}
            Next::Data(len) => rest = rest.get(len..).ok_or(Flaw::Truncated)?,
            Next::Values(count) => {
                if depth >= max_containers.min(open.len()) {
                    return Err(Flaw::TooDeep);
                }
                // Each value takes at least a byte: a longer claim is a lie.
                if count > rest.len() {
                    return Err(Flaw::Truncated);
                }
                open[depth] = values;
                depth += 1;
                values = count;
            }
        }
    }
}

#[inline]
fn marker(rest: &mut &[u8]) -> Result<Next, Flaw> {
    let (&marker, after) = rest.split_first().ok_or(Flaw::Truncated)?;
    *rest = after;
    Ok(match marker {
        0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => Next::Data(0),
        0x80..=0x8f => Next::Values(2 * usize::from(marker & 0x0f)),
        0x90..=0x9f => Next::Values(usize::from(marker & 0x0f)),
        0xa0..=0xbf => Next::Data(usize::from(marker & 0x1f)),
        0xc1 => return Err(Flaw::Reserved),
        0xc4 | 0xd9 => Next::Data(length::<1>(rest)?),
        0xc5 | 0xda => Next::Data(length::<2>(rest)?),
        0xc6 | 0xdb => Next::Data(length::<4>(rest)?),
        // An extension has a type byte before its data.
        0xc7 => Next::Data(length::<1>(rest)?.saturating_add(1)),
        0xc8 => Next::Data(length::<2>(rest)?.saturating_add(1)),
        0xc9 => Next::Data(length::<4>(rest)?.saturating_add(1)),
        0xcc | 0xd0 => Next::Data(1),
        0xcd | 0xd1 | 0xd4 => Next::Data(2),
        0xca | 0xce | 0xd2 => Next::Data(4),
        0xcb | 0xcf | 0xd3 => Next::Data(8),
        0xd5 => Next::Data(3),
        0xd6 => Next::Data(5),
        0xd7 => Next::Data(9),
        0xd8 => Next::Data(17),
        0xdc => Next::Values(length::<2>(rest)?),
        0xdd => Next::Values(length::<4>(rest)?),
        0xde => Next::Values(length::<2>(rest)?.saturating_mul(2)),
        0xdf => Next::Values(length::<4>(rest)?.saturating_mul(2)),
    })
}

#[inline]
fn length<const N: usize>(rest: &mut &[u8]) -> Result<usize, Flaw> {
    let (head, after) = rest.split_first_chunk::<N>().ok_or(Flaw::Truncated)?;
    *rest = after;
    Ok(head.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)))
}
