use polymq::prelude::*;

#[derive(Message)]
#[message(knd = "order")]
struct Misspelt;

#[derive(Message)]
#[message(kind = 5)]
struct NumberForText;

#[derive(Message)]
#[message(kind = "")]
struct Empty;

#[derive(Message)]
#[message(version = "2")]
struct TextForNumber;

#[derive(Message)]
struct Generic<T>(T);

#[derive(Message)]
#[message(kind = "a")]
#[message(version = 1)]
struct Twice;

fn main() {}
