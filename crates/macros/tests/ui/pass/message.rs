//! `#[derive(Message)]` beside serde's derives.
#![deny(warnings)]
use polymq::{Kinds, prelude::*};

#[derive(Debug, Message, Serialize, Deserialize)]
struct OrderCreated {
    id: u64,
}

#[derive(Debug, Message)]
#[message(kind = "order.cancelled", version = 2)]
enum Cancelled {
    #[allow(dead_code)]
    ByCustomer,
}

fn main() {
    // The struct of the same name is there too.
    let _ = Message::new("body");
    let kinds = Kinds::linked().unwrap();
    let kind = |id| kinds.get(id).unwrap().to_string();
    assert_eq!(kind(std::any::TypeId::of::<OrderCreated>()), "order.created");
    assert_eq!(kind(std::any::TypeId::of::<Cancelled>()), "order.cancelled version 2");
}
