"""SQLAlchemy on the same database: its models describe the tables that the migrations have made.

DATABASE_URL=postgresql+asyncpg://shop@localhost/shop python sqlalchemy_app.py
"""

import asyncio
import os

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import ampd

DATABASE_URL = os.environ["DATABASE_URL"]


class Base(DeclarativeBase):
    """What all models derive from; `Base.metadata.create_all` is not called."""


class Visit(Base):
    """A row of the table that 1_visits.sql makes."""

    __tablename__ = "visits"
    id: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]


async def main() -> None:
    """Migrate, and then open the engine: ampd takes the URL as SQLAlchemy spells it."""
    await ampd.migrate(DATABASE_URL, migrations=ampd.read_migrations(package="shop"))
    engine = create_async_engine(DATABASE_URL)
    async with AsyncSession(engine) as session:
        session.add(Visit(worker="sqlalchemy"))
        await session.commit()
        print(await session.scalar(select(func.count()).select_from(Visit)))
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
