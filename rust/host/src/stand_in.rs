// SPDX-License-Identifier: GPL-2.0

//! The part of the `kernel` crate that the engine uses, for the host.
//!
//! There are two kinds of locks. Within [`together`] they are loom's, which runs the threads in
//! every order in which they can take their steps. Elsewhere there is one thread only, and a wait
//! calls the function given to [`sync::while_waiting`] until the wait is over.

#![allow(unsafe_code, reason = "initialisation in place")]

use std::cell::Cell;

thread_local! {
    static TOGETHER: Cell<bool> = const { Cell::new(false) };
}

/// Calls `f` for every interleaving of the threads that it starts, within the bounds of `explorer`.
pub(crate) fn together(explorer: &loom::model::Builder, f: impl Fn() + Send + Sync + 'static) {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            TOGETHER.set(false);
        }
    }
    let _reset = Reset;
    TOGETHER.set(true);
    explorer.check(f);
}

pub(crate) mod prelude {
    use super::sync::Arc;
    use pinned_init::PinInit as Init;
    pub(crate) use pinned_init::{pin_data, pin_init};
    use std::mem::MaybeUninit;

    /// An errno.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Error(&'static str);

    pub(crate) type Result<T = (), E = Error> = core::result::Result<T, E>;

    impl From<std::convert::Infallible> for Error {
        fn from(never: std::convert::Infallible) -> Self {
            match never {}
        }
    }

    macro_rules! errnos {
        ($($name:ident)*) => {
            $(pub(crate) const $name: Error = Error(stringify!($name));)*
        };
    }
    errnos! { EINVAL EPERM EACCES EEXIST EOPNOTSUPP EBUSY ENOMEM EINTR }

    pub(crate) struct Gfp;
    pub(crate) const GFP_KERNEL_ACCOUNT: Gfp = Gfp;

    pub(crate) trait PinInArc<T> {
        fn pin_init<E>(init: impl Init<T, E>, _: Gfp) -> Result<Arc<T>>
        where
            Error: From<E>;
    }

    impl<T> PinInArc<T> for Arc<T> {
        fn pin_init<E>(init: impl Init<T, E>, _: Gfp) -> Result<Arc<T>>
        where
            Error: From<E>,
        {
            let mut place = Arc::new(MaybeUninit::<T>::uninit());
            let inside = Arc::get_mut(&mut place).expect("it is new");
            // SAFETY: The place is valid, stays where it is, and is given up if this fails.
            unsafe { init.__pinned_init(inside.as_mut_ptr()) }?;
            // SAFETY: It was initialised just now.
            Ok(unsafe { place.assume_init() })
        }
    }
}

pub(crate) mod sync {
    use super::TOGETHER;
    use loom::cell::UnsafeCell;
    use std::cell::{RefCell, RefMut};
    use std::ops::{Deref, DerefMut};
    use std::rc::Rc;
    pub(crate) use std::sync::Arc;

    /// Memory that a test frees. With loom, a use that is not ordered before the freeing is an
    /// error.
    pub(crate) struct Memory(Option<UnsafeCell<()>>);

    impl Memory {
        pub(crate) fn new() -> Self {
            Self(TOGETHER.get().then(|| UnsafeCell::new(())))
        }

        pub(crate) fn touch(&self) {
            if let Some(cell) = &self.0 {
                cell.with(|_| ());
            }
        }

        pub(crate) fn free(&self) {
            if let Some(cell) = &self.0 {
                cell.with_mut(|_| ());
            }
        }
    }

    thread_local! {
        static NODE: RefCell<Rc<Memory>> = RefCell::new(Rc::new(Memory(None)));
        static WAITING: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
        static UNLOCKED: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
    }

    /// From here on locks and condition variables made by this thread lie in this memory.
    pub(crate) fn lie_in(memory: &Rc<Memory>) {
        NODE.set(memory.clone());
    }

    /// The function that a wait of this thread calls until it is over.
    pub(crate) fn while_waiting(f: Option<Rc<dyn Fn()>>) {
        WAITING.set(f);
    }

    /// The function that this thread calls each time it has released a lock.
    pub(crate) fn after_unlock(f: Option<Rc<dyn Fn()>>) {
        UNLOCKED.set(f);
    }

    pub(crate) struct SpinLock<T> {
        gate: Option<loom::sync::Mutex<()>>,
        memory: Rc<Memory>,
        value: RefCell<T>,
    }

    impl<T> SpinLock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self {
                gate: TOGETHER.get().then(|| loom::sync::Mutex::new(())),
                memory: NODE.with_borrow(Rc::clone),
                value: RefCell::new(value),
            }
        }

        /// For the checker, which is its only user.
        pub(crate) fn peek<R>(&self, f: impl FnOnce(&T) -> R) -> R {
            f(&self.value.borrow())
        }

        pub(crate) fn lock(&self) -> SpinLockGuard<'_, T> {
            self.memory.touch();
            let gate = self.gate.as_ref().map(|gate| gate.lock().unwrap());
            SpinLockGuard {
                lock: self,
                value: Some(self.value.borrow_mut()),
                gate,
            }
        }
    }

    pub(crate) struct SpinLockGuard<'a, T> {
        lock: &'a SpinLock<T>,
        value: Option<RefMut<'a, T>>,
        gate: Option<loom::sync::MutexGuard<'a, ()>>,
    }

    impl<T> Drop for SpinLockGuard<'_, T> {
        fn drop(&mut self) {
            self.value = None;
            self.gate = None;
            if let Some(f) = UNLOCKED.with_borrow(Option::clone) {
                f();
            }
        }
    }

    impl<T> Deref for SpinLockGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.value.as_ref().expect("only a wait takes it")
        }
    }

    impl<T> DerefMut for SpinLockGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.value.as_mut().expect("only a wait takes it")
        }
    }

    pub(crate) struct CondVar {
        queue: Option<loom::sync::Condvar>,
        memory: Rc<Memory>,
    }

    impl CondVar {
        pub(crate) fn new() -> Self {
            Self {
                queue: TOGETHER.get().then(loom::sync::Condvar::new),
                memory: NODE.with_borrow(Rc::clone),
            }
        }

        pub(crate) fn wait<T>(&self, guard: &mut SpinLockGuard<'_, T>) {
            self.memory.touch();
            guard.value = None;
            if let Some(queue) = &self.queue {
                guard.gate = guard.gate.take().map(|gate| queue.wait(gate).unwrap());
            } else {
                let waiting = WAITING.with_borrow(Option::clone);
                waiting.expect("a wait that nobody ends")();
            }
            guard.value = Some(guard.lock.value.borrow_mut());
        }

        pub(crate) fn notify_all(&self) {
            self.memory.touch();
            if let Some(queue) = &self.queue {
                queue.notify_all();
            }
        }
    }
}

pub(crate) mod seq_file {
    use std::cell::RefCell;

    /// The content of a file of `/proc`.
    #[derive(Default)]
    pub(crate) struct SeqFile(pub(crate) RefCell<String>);
}

macro_rules! new_spinlock {
    ($value:expr, $name:literal) => {
        crate::stand_in::sync::SpinLock::new($value)
    };
}

macro_rules! new_condvar {
    ($name:literal) => {
        crate::stand_in::sync::CondVar::new()
    };
}

macro_rules! seq_print {
    ($seq:expr, $($args:tt)*) => {
        $seq.0.borrow_mut().push_str(&format!($($args)*))
    };
}

pub(crate) use {new_condvar, new_spinlock, seq_print};
